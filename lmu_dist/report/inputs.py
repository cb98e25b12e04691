"""What a report is made from: an MLflow store and an experiment in, or tables of records, `ReportInputs` out.

Reports from both are the same: what is read from MLflow is also written to the report's folder as tables, from which the report
can be made again. Called by report/write.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from lmu_dist.config import ConfigError
from lmu_dist.report.tables import (
    FORECASTS,
    POSITIONS,
    read_forecast_csv,
    read_position_csv,
    write_forecast_csv,
    write_position_csv,
)
from lmu_dist.scaling.collect import Run, Study, select_runs
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.pair import Pair
from lmu_dist.scaling.results import runs_at_largest_budget, runs_compared_by_position
from lmu_dist.scaling.run_csv import read_run_csv, write_run_csv
from lmu_dist.tracking.forecasts import StoredForecast, forecasts_of
from lmu_dist.tracking.runs import position_losses
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.stored_runs import StoredRuns, read_runs

RUNS = "runs.csv"
TABLES = (RUNS, FORECASTS, POSITIONS)


@dataclass(frozen=True)
class ReportInputs:
    """The runs of an experiment, as stored and as selected for fits, their losses by position, and the forecasts.

    `tables` are the files that they were read from; none if they are from MLflow.
    """

    stored: StoredRuns
    study: Study
    curves: Mapping[str, Floats]  # run id: loss at positions 1 .. n
    forecasts: Sequence[StoredForecast]
    any_code: bool
    tables: tuple[Path, ...] = ()


def inputs_from_mlflow(store: Store, experiment: str, any_code: bool, show: Callable[[str, float], None]) -> ReportInputs:
    """Reads everything from MLflow; `show` gets what is being done, and the share of it that is done.

    Raises ConfigError if the experiment does not exist or has no run that can be used.
    """
    show("collecting runs", 0)
    stored = read_runs(store, experiment)
    study = select_runs(stored, any_code)
    wanted, curves = runs_with_curves(study), dict[str, Floats]()
    for i, run in enumerate(wanted):
        show("reading losses by position", i / len(wanted))
        if len(losses := position_losses(store, run.run_id)):
            curves[run.run_id] = np.array(losses)
    return ReportInputs(stored, study, curves, forecasts_of(store, experiment), any_code)


def inputs_from_tables(paths: Sequence[Path], any_code: bool = False) -> ReportInputs:
    """Reads everything from tables of runs, and from the tables of forecasts and of losses by position in their folders.

    Raises ConfigError if a table cannot be read, or has no run that can be used.
    """
    stored = read_run_csv(paths)
    study = select_runs(stored, any_code)
    folders = dict.fromkeys(path.parent for path in paths)
    forecasts = read_forecast_csv([found for folder in folders if (found := folder / FORECASTS).exists()])
    curves = read_position_csv([found for folder in folders if (found := folder / POSITIONS).exists()])
    return ReportInputs(stored, study, curves, forecasts, any_code, tuple(paths))


def runs_with_curves(study: Study) -> list[Run]:
    """Returns the runs whose losses by position a report may show: of any pair, so that the tables are enough for all pairs."""
    wanted = {run.run_id: run for run in runs_at_largest_budget(study)}
    for base, new in permutations(study.families, 2):
        wanted |= {run.run_id: run for run in runs_compared_by_position(study, Pair(base, new))}
    return list(wanted.values())


def check_folder(inputs: ReportInputs, folder: Path) -> None:
    """Raises ConfigError if a report in this folder would replace a table that it is made from."""
    written = {(folder / name).resolve() for name in TABLES}
    read = {found for path in inputs.tables for found in (path, path.parent / FORECASTS, path.parent / POSITIONS)}
    if replaced := [path for path in sorted(read) if path.exists() and path.resolve() in written]:
        raise ConfigError(
            f"a report in {folder} would replace {replaced[0]}, from which it is made; choose another folder by -o"
        )


def write_tables(inputs: ReportInputs, folder: Path) -> list[str]:
    """Writes the tables of records and returns their names. A report can be made from them."""
    names = [RUNS]
    write_run_csv(folder / RUNS, inputs.study, inputs.stored)
    if inputs.forecasts:
        write_forecast_csv(folder / FORECASTS, inputs.forecasts)
        names.append(FORECASTS)
    if curves := {
        run.run_id: inputs.curves[run.run_id] for run in runs_with_curves(inputs.study) if run.run_id in inputs.curves
    }:
        write_position_csv(folder / POSITIONS, curves)
        names.append(POSITIONS)
    return names
