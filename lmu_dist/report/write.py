"""`lmu-dist report`: an MLflow store and an experiment in, a folder of files out, and a run of the report in MLflow.

runs.csv, fits.json, results.json, figures as PNG and SVG, report.html. The MLflow run has them as artifacts, and the digest
of the runs it was made from as a tag: when these change, it is stale.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmu_dist import __version__
from lmu_dist.report.figures import draw
from lmu_dist.report.page import render
from lmu_dist.scaling.collect import Study, collect, write_runs
from lmu_dist.scaling.examine import told
from lmu_dist.scaling.intervals import N_RESAMPLES
from lmu_dist.scaling.results import FamilyFit, Results, analyse, compared_by_position, largest_budgets
from lmu_dist.tracking.store import Store

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
    wanted = {run.run_id: run for run in [*largest_budgets(study), *compared_by_position(study)]}
    curves = dict[str, np.ndarray]()
    for i, run_id in enumerate(wanted):
        show("reading losses by position", 1 + i / len(wanted), 4)
        if len(losses := store.position_losses(run_id)):
            curves[run_id] = np.array(losses)
    show("fitting", 2, 4)
    results = analyse(study, curves, n_resamples)
    show("drawing", 3, 4)
    folder.mkdir(parents=True, exist_ok=True)
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
    run_id, stale = store.write_report(
        experiment, study.digest, [folder / name for name in names], _params(study, any_code), _metrics(results)
    )
    return Written(folder, run_id, study, results, told_results, tuple(stale))


def stale_reports(store: Store, experiment: str) -> list[str]:
    """Run ids of the reports of an experiment that were made from other runs than it has now."""
    now = dict[bool, str]()
    stale = list[str]()
    for run_id, digest, any_code in store.reports(experiment):
        if any_code not in now:
            now[any_code] = collect(store, experiment, any_code).digest
        if digest != now[any_code]:
            stale.append(run_id)
    return stale


def _fit(fit: FamilyFit) -> dict[str, Any]:
    facts = told(fit.examination, fit.run_ids)
    return {"family": fit.family, **facts, "conventions": [asdict(c) for c in fit.conventions], "run_ids": list(fit.run_ids)}


def _results(study: Study, results: Results) -> dict[str, Any]:
    left_out = [{"run_id": out.run_id, "name": out.name, "reason": out.reason} for out in study.left_out]
    parts = ("answer", "comparisons", "improvement", "positions")
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


def _params(study: Study, any_code: bool) -> dict[str, str]:
    first = study.runs[0].record
    return {
        "data_digest": first.data_digest,
        "code_digest": "any" if any_code else first.code_digest,
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
    commands = [("this report", f"lmu-dist report {study.experiment}{flag}")]
    for fit in results.fits:
        conditions = f"--where family={fit.family} --where 'left_out='"
        columns = "--n n_params --d tokens --loss val_loss_nats"
        commands.append((f"law of {fit.family}", f"lmu-dist fit runs.csv {columns} {conditions}"))
    commands.append(
        ("all numbers", "results.json, fits.json and runs.csv, beside this page and as artifacts of its MLflow run")
    )
    return commands


def plain(value: Any) -> Any:
    """For JSON: tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return plain(value.item())
    return value


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1) + "\n")
