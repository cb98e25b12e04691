"""Writes tables of records back into an MLflow store: runs.csv and the tables in its folder in, runs and forecasts out.

For a store that was lost. Everything is read and checked before anything is written, and what the store has already is not
written again: so the command can be interrupted and repeated. Called by cli/restore.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lmu_dist.config import ConfigError
from lmu_dist.report.inputs import RUNS
from lmu_dist.report.tables import FORECASTS, POSITIONS, read_forecast_csv, read_position_csv
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.run_csv import read_experiments, read_run_csv
from lmu_dist.tracking.ended_rows import keep_rows
from lmu_dist.tracking.experiments import check_not_deleted
from lmu_dist.tracking.forecasts import StoredForecast, forecasts_of, save_forecast
from lmu_dist.tracking.restored import KnownCells, find_known_cells, is_running_nothing, restore_run, restored_tags
from lmu_dist.tracking.runs import KnownRuns, record_of, runs_of
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.stored_runs import StoredRuns
from lmu_dist.tracking.studies import add_to_plan, describe_study, end_study, open_study, set_baseline
from lmu_dist.tracking.tags import LADDER_STUDY

DIGEST_DIGITS = 12


@dataclass(frozen=True)
class RestoredTable:
    """What was written of the runs that a table has of an experiment.

    `n_known` runs were in the store already, `n_without_result` have no result, and `n_not_started` cells no run.
    `not_ended` are the MLflow ids of runs in the store that have not ended, of cells that have in the table.
    """

    table: str
    experiment: str
    n_restored: int
    n_known: int
    n_without_result: int
    n_not_started: int
    n_forecasts: int
    not_ended: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a user should know of it."""
        notes = list[str]()
        if n := self.n_without_result + self.n_not_started:
            notes.append(f"{self.experiment}: {n:,} cells of the table have no result; its ladder plans and trains them again")
        if self.not_ended:
            notes.append(
                f"{self.experiment}: {len(self.not_ended):,} runs of the store have not ended, and have a result in the table; "
                f"to take it, stop and delete them (`mlflow runs delete --run-id {self.not_ended[0]}`), then restore again"
            )
        return notes


@dataclass(frozen=True)
class _Table:
    path: Path
    stored: StoredRuns
    forecasts: Sequence[StoredForecast]

    @property
    def source(self) -> str:
        """The table in words, for tags."""
        return f"{self.path.name} sha256:{hashlib.sha256(self.path.read_bytes()).hexdigest()[:DIGEST_DIGITS]}"


def restore(store: Store, paths: Sequence[Path], show: Callable[..., None]) -> list[RestoredTable]:
    """Writes the runs of tables of records into MLflow, each into the experiment that its table names.

    `show` gets an activity, the amount done, the total and a text. Raises ConfigError before anything is written if a table
    cannot be read or lacks a column, or the store cannot be written; MLflowUnavailableError if it does not answer.
    """
    tables = [table for path in paths for table in _read(path, paths)]
    read_run_csv(paths)  # two tables with different results of a run are an error
    curves = read_position_csv([found for folder in _folders(paths) if (found := folder / POSITIONS).exists()])
    store.check()
    for table in tables:
        check_not_deleted(store, table.stored.experiment)
    known = find_known_cells(store)
    return [_restore(store, table, curves, known, show) for table in tables]


def _folders(paths: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(path.parent for path in paths))


def _read(path: Path, paths: Sequence[Path]) -> list[_Table]:
    """Reads a table, and the forecasts in its folder if these are of its experiment: a report writes both side by side.

    `paths`: all tables that are restored. The forecasts name no experiment, so several tables in their folder are an error.
    """
    experiments = read_experiments(path)
    forecast_file = path.parent / FORECASTS
    has_forecasts = forecast_file.exists() and (path.name == RUNS or not (path.parent / RUNS).exists())
    if has_forecasts:
        # A runs.csv is the table that the report wrote with them. Without one it can be any table of the folder.
        same_folder = {p.resolve(): p for p in paths if p.parent.resolve() == path.parent.resolve()}
        candidates = [path] if path.name == RUNS else list(same_folder.values())
        named = experiments if len(candidates) == 1 else [found for p in candidates for found in read_experiments(p)]
        if len(candidates) > 1 or len(named) > 1:
            names = ", ".join(dict.fromkeys(stored.experiment for stored in named))
            files = ", ".join(p.name for p in candidates)
            raise ConfigError(
                f"{forecast_file} does not say to which experiment of {files} it belongs: {names}; "
                f"make a table of each in a folder of its own, and put {FORECASTS} into the folder of the right one"
            )
    forecasts = read_forecast_csv([forecast_file]) if has_forecasts else []
    return [_Table(path, stored, forecasts) for stored in experiments]


def _restore(
    store: Store, table: _Table, curves: Mapping[str, Floats], known: KnownCells, show: Callable[..., None]
) -> RestoredTable:
    """Writes the runs and forecasts of one table and experiment, and adds the runs to `known`."""
    stored, source = table.stored, table.source
    experiment_id, study_id = _open_study(store, stored)
    with_result = [(run, run.record) for run in stored.runs if run.record is not None]
    n_restored, not_ended, elsewhere = 0, list[str](), list[dict[str, object]]()
    for i, (run, record) in enumerate(with_result):
        show(f"restoring {stored.experiment}", i / len(with_result), 1, f"{i} of {len(with_result)} runs")
        in_store = known.by_key.get(record.key)
        if in_store is None and run.run_id not in known.ids:
            losses = curves[run.run_id].tolist() if run.run_id in curves else []
            known.by_key[record.key] = restore_run(store, experiment_id, study_id, run, losses, source)
            known.ids.add(run.run_id)
            n_restored += 1
        elif in_store is not None and record_of(in_store) is None:
            not_ended.append(in_store.info.run_id)
        if in_store is not None and in_store.info.experiment_id != experiment_id:
            planned = {"planned_tokens": record.planned_tokens, "n_workers": int(float(run.n_workers or 1))}
            elsewhere.append({"key": record.key, "name": run.name, **planned})
    add_to_plan(store, stored.experiment, study_id, elsewhere)
    had = [replace(forecast, run_id="") for forecast in forecasts_of(store, stored.experiment)]
    new = [forecast for forecast in table.forecasts if replace(forecast, run_id="") not in had]
    for forecast in new:
        save_forecast(store, stored.experiment, forecast, restored_tags(forecast.run_id, source))
    runs = runs_of(store, stored.experiment)
    # A new study is RUNNING, also one that an earlier restore left behind when it was killed, and no driver would end it.
    if is_running_nothing(store, stored.experiment, study_id, KnownRuns(runs)):
        end_study(store, stored.experiment, LADDER_STUDY, known=KnownRuns(runs))
    else:
        describe_study(store, stored.experiment, study_id, KnownRuns(runs))
    keep_rows(store, stored.experiment, runs)  # `status` looks for newly ended runs among the last ones only
    return RestoredTable(
        table=str(table.path),
        experiment=stored.experiment,
        n_restored=n_restored,
        n_known=len(with_result) - n_restored,
        n_without_result=len(stored.runs) - len(with_result),
        n_not_started=len(stored.not_started),
        n_forecasts=len(new),
        not_ended=tuple(not_ended),
    )


def _open_study(store: Store, stored: StoredRuns) -> tuple[str, str]:
    """Returns the ids of the experiment and of the study that its runs belong to."""
    experiment_id, study_id = open_study(store, stored.experiment, LADDER_STUDY)
    if stored.baseline:
        set_baseline(store, study_id, stored.baseline)
    return experiment_id, study_id
