"""Writes the report of `lmu-dist report`: an experiment in MLflow or tables of records in, a folder of files out.

The files are tables of records, fits.json, results.json, figures as PNG and SVG, and report.html. A report of an experiment
is also a run in MLflow, with the files as artifacts, and as a tag the digest of the runs they were made from: if these runs
change, the report is stale.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from lmu_dist import __version__
from lmu_dist.config import ConfigError
from lmu_dist.report.figures import draw_figures
from lmu_dist.report.forecasts import ForecastScores, score_forecasts
from lmu_dist.report.inputs import (
    TABLES,
    ReportInputs,
    check_folder,
    inputs_from_mlflow,
    inputs_from_tables,
    write_tables,
)
from lmu_dist.report.page import render
from lmu_dist.report.upload import upload_report
from lmu_dist.scaling.as_json import comparison_to_json, fit_to_json, to_json
from lmu_dist.scaling.band_table import band_sentences
from lmu_dist.scaling.collect import Study, collect
from lmu_dist.scaling.intervals import N_RESAMPLES
from lmu_dist.scaling.results import FamilyFit, Results, analyse, default_pair
from lmu_dist.tracking.reports import reports_of
from lmu_dist.tracking.store import Store

RESULTS_VERSION = 2  # of results.json, see docs/reading-a-report.md; 1 had no version, and always lmu over transformer
ShowProgress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class ReportFiles:
    """A written report: its folder, the study, its results and forecasts.

    `run_id` is its run in MLflow, "" if it has none; `stale` are the runs of earlier reports that are stale now.
    """

    folder: Path
    run_id: str
    study: Study
    results: Results
    forecasts: ForecastScores
    results_json: dict[str, Any]
    stale: tuple[str, ...]


def write_report(
    store: Store,
    experiment: str,
    folder: Path,
    any_code: bool,
    show: ShowProgress,
    n_resamples: int = N_RESAMPLES,
    baseline: str | None = None,
    family: str | None = None,
) -> ReportFiles:
    """Collects and analyses the runs of an experiment, writes all files of the report and uploads them to MLflow.

    `baseline` and `family` are the two whose factor is the answer; by default the baseline is plan.baseline of the experiment's
    ladder, and else `choose_pair` has a rule. Raises ConfigError if the experiment has no usable run or lacks one of these
    families, OSError if a file cannot be written.
    """
    inputs = inputs_from_mlflow(store, experiment, any_code, lambda what, share: show(what, share / 2, 1))
    files, names = _write_files(inputs, folder, show, n_resamples, baseline, family)
    show("uploading to MLflow", 0.875, 1)
    run_id, stale = upload_report(store, folder, names, files.study, files.results, files.forecasts, any_code)
    return replace(files, run_id=run_id, stale=stale)


def write_report_from_tables(
    tables: Sequence[Path],
    folder: Path,
    any_code: bool,
    show: ShowProgress,
    n_resamples: int = N_RESAMPLES,
    baseline: str | None = None,
    family: str | None = None,
) -> ReportFiles:
    """Writes the report of the runs in tables of records, without MLflow; its numbers are those of a report from MLflow.

    The errors are those of `write_report`, and ConfigError with row and column for a cell that cannot be read.
    """
    show("reading tables", 0, 1)
    inputs = inputs_from_tables(tables, any_code)
    check_folder(inputs, folder)
    return _write_files(inputs, folder, show, n_resamples, baseline, family)[0]


def _write_files(
    inputs: ReportInputs, folder: Path, show: ShowProgress, n_resamples: int, baseline: str | None, family: str | None
) -> tuple[ReportFiles, list[str]]:
    """Writes all files of a report and returns their names, too."""
    study = inputs.study
    pair = default_pair(study, baseline, family, inputs.stored.baseline)
    _create(folder)
    show("fitting", 0.5, 1)
    results = analyse(study, inputs.curves, n_resamples, pair)
    forecasts = score_forecasts(study, inputs.forecasts)
    show("drawing", 0.75, 1)
    _delete_earlier_report(folder)
    figures = draw_figures(study, results, forecasts, folder)
    tables = write_tables(inputs, folder)
    facts = {"experiment": study.experiment, "digest": study.digest, "any_code": inputs.any_code, "lmu_dist": __version__}
    pair_facts = {"version": RESULTS_VERSION, "pair": asdict(pair)}
    results_json = facts | pair_facts | to_json(_results(study, results) | {"forecasts": forecasts.to_json()})
    fits = facts | to_json({"fits": [_fit(fit) for fit in results.fits]})
    _write_json(folder / "results.json", results_json)
    _write_json(folder / "fits.json", fits)
    page = render(study, results, forecasts, figures, _reproduce(inputs, results))
    (folder / "report.html").write_text(page, encoding="utf-8")
    images = [f"{figure.name}.{kind}" for figure in figures for kind in ("png", "svg")]
    names = [*tables, "fits.json", "results.json", "report.html", *images]
    return ReportFiles(folder, "", study, results, forecasts, results_json, ()), names


def _create(folder: Path) -> None:
    """Creates the folder. Raises ConfigError if it is not writable, before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ConfigError(f"a report cannot be written to {folder}: {e.strerror}; choose another folder with -o") from e


def _delete_earlier_report(folder: Path) -> None:
    """Deletes its figures and tables: the new report may not have them all."""
    if (folder / "report.html").exists():
        for old in [*folder.glob("*.png"), *folder.glob("*.svg"), *(folder / name for name in TABLES)]:
            old.unlink(missing_ok=True)


def stale_reports(store: Store, experiment: str) -> list[str]:
    """Returns the run ids of the reports whose runs differ from those the experiment has now."""
    made = reports_of(store, experiment)
    now = {any_code: _digest(store, experiment, any_code) for any_code in {any_code for _, _, any_code in made}}
    return [run_id for run_id, digest, any_code in made if digest != now[any_code]]


def _digest(store: Store, experiment: str, any_code: bool) -> str:
    try:
        return collect(store, experiment, any_code).digest
    except ConfigError:  # the experiment has no finished run any more
        return ""


def _fit(fit: FamilyFit) -> dict[str, Any]:
    facts = fit_to_json(fit.result, fit.run_ids)
    laws = comparison_to_json(fit.comparison)
    conventions = [asdict(c) for c in fit.conventions]
    effective = asdict(fit.effective) if fit.effective else None
    more = {"conventions": conventions, "run_ids": list(fit.run_ids), "comparison": laws, "effective_tokens": effective}
    return {"family": fit.family, **facts, **more}


def _results(study: Study, results: Results) -> dict[str, Any]:
    left_out = [{"run_id": out.run_id, "name": out.name, "reason": out.reason} for out in study.left_out]
    parts = ("answer", "comparisons", "controlled", "improvement", "in_size", "positions", "bands")
    return {
        **{
            name: [asdict(v) for v in value] if isinstance(value := getattr(results, name), tuple) else asdict(value)
            for name in parts
        },
        "seed_noise": asdict(results.noise.overall) if results.noise.overall else None,
        "by_position": asdict(results.by_position) if results.by_position else None,
        "band_sentences": band_sentences(results.bands, study.title),
        "determined": {fit.family: fit.result.diagnostics.passed for fit in results.fits},
        "n_runs": len(study.runs),
        "left_out": left_out,
    }


def _reproduce(inputs: ReportInputs, results: Results) -> list[tuple[str, str]]:
    study, planned = inputs.study, inputs.stored.baseline
    flag = " --any-code" if inputs.any_code else ""
    pair, usual = results.pair, default_pair(study)
    is_usual = planned in (None, usual.base) and (pair.base, pair.new) == (usual.base, usual.new)
    options = flag + ("" if is_usual else f" --baseline {pair.base} --family {pair.new}")
    from_tables = f"lmu-dist report --from runs.csv -o again{options}"
    again = from_tables if inputs.tables else f"lmu-dist report {shlex.quote(study.experiment)}{options}"
    note = "" if inputs.tables else "  (set MLFLOW_TRACKING_URI to the MLflow store)"
    commands = [
        ("this report", f"{again}{note}"),
        *([] if inputs.tables else [("this report without MLflow", f"{from_tables}  (in the folder of this page)")]),
        ("answer, factors, change with size", f"{again} --json  (keys answer, pair, comparisons, controlled)"),
        ("improvement ratio, seed noise, power laws in N", f"{again} --json  (keys improvement, seed_noise, in_size)"),
        ("loss by position", f"{again} --json  (keys positions, bands, by_position)"),
        ("forecasts and their scores", f"{again} --json  (key forecasts)"),
    ]
    for fit in results.fits:
        conditions = f"--where family={fit.family} --where 'left_out='"
        columns = "--n n_params --d tokens --loss val_loss_nats"
        fit_command = f"lmu-dist fit runs.csv {columns} {conditions}"
        commands.append((f"scaling law of {fit.family}", fit_command))
        commands.append((f"laws of {fit.family} side by side", f"{fit_command} --law all"))
    commands.append(
        ("all numbers", "results.json, fits.json and runs.csv, in the folder of this page and as artifacts of its MLflow run")
    )
    return commands


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
