"""Writes the report of `lmu-dist report`: an MLflow store and an experiment in, a folder of files and an MLflow run out.

The files are runs.csv, fits.json, results.json, figures as PNG and SVG, and report.html. The MLflow run has them as artifacts,
and as a tag the digest of the runs they were made from: if these runs change, the report is stale.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmu_dist import __version__
from lmu_dist.config import ConfigError, FailedError
from lmu_dist.report.figures import draw_figures
from lmu_dist.report.forecasts import ForecastScores, score_forecasts
from lmu_dist.report.page import render
from lmu_dist.scaling.as_json import comparison_to_json, fit_to_json, to_json
from lmu_dist.scaling.collect import Study, collect, write_runs
from lmu_dist.scaling.intervals import N_RESAMPLES
from lmu_dist.scaling.pair import Pair
from lmu_dist.scaling.results import (
    FamilyFit,
    Results,
    analyse,
    default_pair,
    runs_at_largest_budget,
    runs_compared_by_position,
)
from lmu_dist.tracking.errors import MLflowUnavailableError
from lmu_dist.tracking.forecasts import forecasts_of
from lmu_dist.tracking.reports import reports_of, save_report
from lmu_dist.tracking.runs import position_losses
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import planned_baseline

RESULTS_VERSION = 2  # of results.json, see docs/reading-a-report.md; 1 had no version, and always lmu over transformer
ShowProgress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class ReportFiles:
    """A written report: its folder, its MLflow run, the study, its results and forecasts, and earlier reports now stale."""

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
    """Collects and analyses the runs of an experiment and writes all files of the report.

    `baseline` and `family` are the two whose factor is the answer; by default the baseline is plan.baseline of the experiment's
    ladder, and else `choose_pair` has a rule. Raises ConfigError if the experiment has no usable run or lacks one of these
    families, OSError if a file cannot be written.
    """
    show("collecting runs", 0, 4)
    study = collect(store, experiment, any_code)
    planned = planned_baseline(store, experiment)
    pair = default_pair(study, baseline, family, planned)
    _prepare_folder(folder)
    wanted = {run.run_id: run for run in [*runs_at_largest_budget(study), *runs_compared_by_position(study, pair)]}
    curves = dict[str, np.ndarray]()
    for i, run_id in enumerate(wanted):
        show("reading losses by position", 1 + i / len(wanted), 4)
        if len(losses := position_losses(store, run_id)):
            curves[run_id] = np.array(losses)
    show("fitting", 2, 4)
    results = analyse(study, curves, n_resamples, pair)
    forecasts = score_forecasts(study, forecasts_of(store, experiment))
    show("drawing", 3, 4)
    figures = draw_figures(study, results, forecasts, folder)
    write_runs(folder / "runs.csv", study)
    facts = {"experiment": experiment, "digest": study.digest, "any_code": any_code, "lmu_dist": __version__}
    pair_facts = {"version": RESULTS_VERSION, "pair": asdict(pair)}
    results_json = facts | pair_facts | to_json(_results(study, results) | {"forecasts": forecasts.to_json()})
    fits = facts | to_json({"fits": [_fit(fit) for fit in results.fits]})
    _write_json(folder / "results.json", results_json)
    _write_json(folder / "fits.json", fits)
    page = render(study, results, forecasts, figures, _reproduce(study, results, any_code, planned))
    (folder / "report.html").write_text(page, encoding="utf-8")
    show("uploading to MLflow", 3.5, 4)
    names = [
        "runs.csv",
        "fits.json",
        "results.json",
        "report.html",
        *(f"{f.name}.{kind}" for f in figures for kind in ("png", "svg")),
    ]
    try:
        kept = [folder / name for name in names]
        answer = f"{results.answer.verdict}. {results.answer.sentence}"
        metrics = _metrics(results, forecasts)
        run_id, stale = save_report(
            store, experiment, study.digest, any_code, pair.name, kept, _params(study, pair), metrics, answer
        )
    except MLflowUnavailableError as e:
        raise FailedError(f"the report was written to {folder}, but not uploaded: {e}") from e
    return ReportFiles(folder, run_id, study, results, forecasts, results_json, tuple(stale))


def _prepare_folder(folder: Path) -> None:
    """Creates the folder and deletes the figures of an earlier report. Raises ConfigError if the folder is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runs.csv").touch()
    except OSError as e:
        raise ConfigError(f"a report cannot be written to {folder}: {e.strerror}; choose another folder with -o") from e
    if (folder / "report.html").exists():
        for old in [*folder.glob("*.png"), *folder.glob("*.svg")]:
            old.unlink()


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
    parts = ("answer", "comparisons", "controlled", "improvement", "in_size", "positions")
    return {
        **{
            name: [asdict(v) for v in value] if isinstance(value := getattr(results, name), tuple) else asdict(value)
            for name in parts
        },
        "seed_noise": asdict(results.noise) if results.noise else None,
        "by_position": asdict(results.by_position) if results.by_position else None,
        "determined": {fit.family: fit.result.diagnostics.passed for fit in results.fits},
        "n_runs": len(study.runs),
        "left_out": left_out,
    }


def _params(study: Study, pair: Pair) -> dict[str, str]:
    return {
        "baseline": pair.base,
        "family": pair.new,
        "data_digest": study.runs[0].record.data_digest,
        "versions": study.versions,
        "lmu_dist": __version__,
        "n_runs": str(len(study.runs)),
        "n_left_out": str(len(study.left_out)),
    }


def _metrics(results: Results, forecasts: ForecastScores) -> dict[str, float]:
    """Returns the metrics of the report's MLflow run: parameters of determined laws, known factors, scores of forecasts."""
    found = dict[str, float]()
    if forecasts.share_inside is not None and forecasts.typical_error is not None:
        found |= {"forecast/scored": len(forecasts.counted), "forecast/share_inside": forecasts.share_inside}
        found["forecast/median_absolute_error"] = forecasts.typical_error
    for fit in results.fits:
        if law := fit.result.law:
            found |= {f"fit/{fit.family}/{name}": value for name, value in vars(law).items()}
    for comparison in results.all_comparisons:
        for size in comparison.sizes:
            for source, factor in (("curves", size.curves), ("laws", size.laws)):
                key = f"efficiency_factor/{comparison.new}_over_{comparison.base}/{source}"
                ends = zip(("", "_low", "_high"), (factor.value, *(factor.interval or (None, None))), strict=True)
                found |= {f"{key}/{size.n_params}{end}": value for end, value in ends if value is not None}
    return found


def _reproduce(study: Study, results: Results, any_code: bool, planned: str | None) -> list[tuple[str, str]]:
    flag = " --any-code" if any_code else ""
    pair, usual = results.pair, default_pair(study)
    is_usual = planned in (None, usual.base) and (pair.base, pair.new) == (usual.base, usual.new)
    asked = "" if is_usual else f" --baseline {pair.base} --family {pair.new}"
    again = f"lmu-dist report {shlex.quote(study.experiment)}{flag}{asked}"
    commands = [
        ("this report", f"{again}  (set MLFLOW_TRACKING_URI to the MLflow store)"),
        ("answer, factors, change with size", f"{again} --json  (keys answer, pair, comparisons, controlled)"),
        ("improvement ratio, seed noise, power laws in N", f"{again} --json  (keys improvement, seed_noise, in_size)"),
        ("loss by position", f"{again} --json  (keys positions, by_position)"),
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
