"""`lmu-dist report`: an MLflow store and an experiment in, a folder of files out, and a run of the report in MLflow.

runs.csv, fits.json, results.json, figures as PNG and SVG, report.html. The MLflow run has them as artifacts, and the digest
of the runs it was made from as a tag: when these change, it is stale.
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
from lmu_dist.report.figures import draw
from lmu_dist.report.page import render
from lmu_dist.scaling.collect import Study, collect, write_runs
from lmu_dist.scaling.intervals import N_RESAMPLES
from lmu_dist.scaling.results import FamilyFit, Results, analyse, compared_by_position, largest_budgets
from lmu_dist.scaling.tell import plain, told
from lmu_dist.tracking.store import AwayError, Store

Show = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Written:
    """What was made: the folder, the run in MLflow that keeps it, the results, and the reports that it makes stale."""

    folder: Path
    run_id: str
    study: Study
    answer: Results
    results: dict[str, Any]
    stale: tuple[str, ...]


def write_report(
    store: Store, experiment: str, folder: Path, any_code: bool, show: Show, n_resamples: int = N_RESAMPLES
) -> Written:
    """Collects, analyses, draws and writes. Raises ConfigError if there is nothing to report on; OSError if it cannot write."""
    show("collecting runs", 0, 4)
    study = collect(store, experiment, any_code)
    _make_room(folder)
    wanted = {run.run_id: run for run in [*largest_budgets(study), *compared_by_position(study)]}
    curves = dict[str, np.ndarray]()
    for i, run_id in enumerate(wanted):
        show("reading losses by position", 1 + i / len(wanted), 4)
        if len(losses := store.position_losses(run_id)):
            curves[run_id] = np.array(losses)
    show("fitting", 2, 4)
    results = analyse(study, curves, n_resamples)
    show("drawing", 3, 4)
    figures = draw(study, results, folder)
    write_runs(folder / "runs.csv", study)
    facts = {"experiment": experiment, "digest": study.digest, "any_code": any_code, "lmu_dist": __version__}
    told_results = facts | plain(_results(study, results))
    fits = facts | plain({"fits": [_fit(fit) for fit in results.fits]})
    _write_json(folder / "results.json", told_results)
    _write_json(folder / "fits.json", fits)
    (folder / "report.html").write_text(render(study, results, figures, _reproduce(study, results, any_code)), encoding="utf-8")
    show("telling MLflow", 3.5, 4)
    names = [
        "runs.csv",
        "fits.json",
        "results.json",
        "report.html",
        *(f"{f.name}.{kind}" for f in figures for kind in ("png", "svg")),
    ]
    try:
        kept = [folder / name for name in names]
        run_id, stale = store.write_report(experiment, study.digest, any_code, kept, _params(study), _metrics(results))
    except AwayError as e:
        raise FailedError(f"the report is whole in {folder}, but {e}") from e
    return Written(folder, run_id, study, results, told_results, tuple(stale))


def _make_room(folder: Path) -> None:
    """Makes the folder, and takes the figures of an earlier report out of it. Raises ConfigError if nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runs.csv").touch()
    except OSError as e:
        raise ConfigError(f"a report cannot be written to {folder}: {e.strerror}; choose another folder with -o") from e
    if (folder / "report.html").exists():
        for old in [*folder.glob("*.png"), *folder.glob("*.svg")]:
            old.unlink()


def stale_reports(store: Store, experiment: str) -> list[str]:
    """Run ids of the reports of an experiment that were made from other runs than it has now."""
    made = store.reports(experiment)
    now = {any_code: _digest(store, experiment, any_code) for any_code in {any_code for _, _, any_code in made}}
    return [run_id for run_id, digest, any_code in made if digest != now[any_code]]


def _digest(store: Store, experiment: str, any_code: bool) -> str:
    try:
        return collect(store, experiment, any_code).digest
    except AwayError:
        raise
    except ConfigError:  # no finished run any more
        return ""


def _fit(fit: FamilyFit) -> dict[str, Any]:
    facts = told(fit.examination, fit.run_ids)
    return {"family": fit.family, **facts, "conventions": [asdict(c) for c in fit.conventions], "run_ids": list(fit.run_ids)}


def _results(study: Study, results: Results) -> dict[str, Any]:
    left_out = [{"run_id": out.run_id, "name": out.name, "reason": out.reason} for out in study.left_out]
    parts = ("answer", "comparisons", "improvement", "in_size", "positions")
    return {
        **{
            name: [asdict(v) for v in value] if isinstance(value := getattr(results, name), tuple) else asdict(value)
            for name in parts
        },
        "seed_noise": asdict(results.noise) if results.noise else None,
        "by_position": asdict(results.by_position) if results.by_position else None,
        "determined": {fit.family: fit.examination.certificate.ok for fit in results.fits},
        "n_runs": len(study.runs),
        "left_out": left_out,
    }


def _params(study: Study) -> dict[str, str]:
    return {
        "data_digest": study.runs[0].record.data_digest,
        "code_digest": ",".join(sorted({run.record.code_digest[:16] for run in study.runs})),
        "lmu_dist": __version__,
        "n_runs": str(len(study.runs)),
        "n_left_out": str(len(study.left_out)),
    }


def _metrics(results: Results) -> dict[str, float]:
    """What one may want to query: parameters of determined laws, and the factors that are known."""
    found = dict[str, float]()
    for fit in results.fits:
        if law := fit.examination.law:
            found |= {f"fit/{fit.family}/{name}": value for name, value in vars(law).items()}
    for comparison in results.comparisons:
        for size in comparison.sizes:
            for source, factor in (("curves", size.curves), ("laws", size.laws)):
                key = f"efficiency_factor/{comparison.new}_over_{comparison.base}/{source}"
                ends = zip(("", "_low", "_high"), (factor.value, *(factor.interval or (None, None))), strict=True)
                found |= {f"{key}/{size.n_params}{end}": value for end, value in ends if value is not None}
    return found


def _reproduce(study: Study, results: Results, any_code: bool) -> list[tuple[str, str]]:
    flag = " --any-code" if any_code else ""
    again = f"lmu-dist report {shlex.quote(study.experiment)}{flag}"
    commands = [
        ("this report", f"{again}  (MLFLOW_TRACKING_URI names the store)"),
        ("answer, factors, growth", f"{again} --json: answer, comparisons"),
        ("ratio, noise, power laws", f"{again} --json: improvement, seed_noise, in_size"),
        ("loss by position", f"{again} --json: positions, by_position"),
    ]
    for fit in results.fits:
        conditions = f"--where family={fit.family} --where 'left_out='"
        columns = "--n n_params --d tokens --loss val_loss_nats"
        commands.append((f"law of {fit.family}", f"lmu-dist fit runs.csv {columns} {conditions}"))
    commands.append(
        ("all numbers", "results.json, fits.json and runs.csv, beside this page and as artifacts of its MLflow run")
    )
    return commands


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
