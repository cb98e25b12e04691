"""The table of records, runs.csv: a study and its stored runs in, a CSV file out, and back.

It has all that a report reads of runs in MLflow, so a report can be made from it. `report` writes it and `report --from` reads
it; docs/reading-a-report.md lists its columns. `rung`, `left_out` and `epochs` are results and are not read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lmu_dist.config import ConfigError
from lmu_dist.records import COMPLETE, RunRecord
from lmu_dist.scaling.collect import Study
from lmu_dist.scaling.record_csv import CsvRow, read_csv, time_text, write_csv
from lmu_dist.tracking.stored_runs import SOURCE, StoredRun, StoredRuns

WHAT = "table of runs"
PLANNED = "planned"  # status of a cell that has no run
RECORD = tuple(f for f in fields(RunRecord) if f.name != "unknown")
RECORD_COLUMNS = tuple(f.name for f in RECORD)
NEEDED = ("run_id", "family", "n_params", "tokens", "val_loss_nats", "key", "phase", "status")
# Every version wrote these, too. Without them runs of other budgets, seeds or data would be taken for the same.
NEEDED += ("planned_tokens", "seed", "learning_rate", "sequence_tokens", "data_digest")
NUMBERS = ("train.rate_token_exponent", "train.learning_rate", "train.plateau_patience")  # settings that are computed with
IN_EVERY_RECORD = ("family", "n_params", "tokens", "val_loss_nats", "key", "phase", "status")
TO_RESTORE = (*NEEDED, "name", "steps", "family_version", "train_version", "experiment", "started", "ended")
OF_THE_RUN = ("experiment", "baseline", "started", "ended", "n_workers", "git_commit", "family_appearance", SOURCE)


def write_run_csv(path: Path, study: Study, stored: StoredRuns) -> None:
    """Writes all runs: those that fits use in the order of the study, then those left out, each with the reason."""
    settings = sorted({key for run in stored.runs for key in run.params} - {SOURCE})
    columns = ("run_id", "name", "rung", "left_out", *RECORD_COLUMNS, "epochs", *OF_THE_RUN, *settings)
    write_csv(path, columns, _rows(study, stored))


def _rows(study: Study, stored: StoredRuns) -> Iterator[dict[str, Any]]:
    # Each row has the run's own experiment, so that a table made from tables of several can be restored.
    def common(experiment: str) -> dict[str, Any]:
        return {"experiment": experiment or stored.experiment, "baseline": stored.baseline or ""}

    cells = {run.run_id: common(run.experiment) | _cells(run) for run in stored.runs}
    for run in study.runs:
        yield cells[run.run_id] | {"rung": run.size_bin}
    for out in study.left_out:
        if out.run_id:
            yield cells[out.run_id] | {"left_out": out.reason}
        else:
            yield common(stored.planned_in.get(out.name, "")) | {"name": out.name, "status": PLANNED, "left_out": out.reason}


def _cells(run: StoredRun) -> dict[str, Any]:
    of_record = {name: getattr(run.record, name) for name in RECORD_COLUMNS} if run.record else {"status": run.status}
    return of_record | {
        "run_id": run.run_id,
        "name": run.name,
        "epochs": run.record.epochs if run.record else "",
        "started": time_text(run.started_ms),
        "ended": time_text(run.ended_ms),
        "n_workers": run.n_workers,
        "git_commit": run.git_commit,
        "family_appearance": run.appearance,
        **run.params,
    }


def read_run_csv(paths: Sequence[Path]) -> StoredRuns:
    """Reads tables of records as one experiment. A run that several tables have counts once.

    Columns that an earlier version did not write have their defaults, those of a later version are ignored. Raises ConfigError
    with row and column for a cell that cannot be read.
    """
    return _stored_runs([row for path in paths for row in _rows_of(path, NEEDED)])


def read_experiments(path: Path) -> list[StoredRuns]:
    """Reads a table of records to write its runs into MLflow again: the runs of each experiment that it names, in its order.

    Raises ConfigError like `read_run_csv`, and if the table lacks what a run in MLflow needs besides a result.
    """
    experiments = dict[str, list[CsvRow]]()
    for row in _rows_of(path, TO_RESTORE):
        for column in ("experiment", "name", *(("started",) if row.text("run_id") else ())):
            if not row.text(column):
                raise row.error(column, "empty; a run in MLflow needs it")
        experiments.setdefault(row.text("experiment"), []).append(row)
    return [_stored_runs(rows) for rows in experiments.values()]


def _rows_of(path: Path, needed: Sequence[str]) -> list[CsvRow]:
    if not (rows := read_csv(path, needed, WHAT)):
        raise ConfigError(f"{path} has no runs")
    return rows


def _stored_runs(rows: Sequence[CsvRow]) -> StoredRuns:
    """Returns the runs of rows as one experiment."""
    found = dict[str, tuple[StoredRun, CsvRow]]()
    experiments, baselines = dict[str, None](), set[str]()
    not_started, names = dict[str, str](), set[str]()
    for row in rows:
        experiments[_experiment_of(row)] = None
        baselines |= {row.text("baseline")} - {""}
        if not row.text("run_id"):
            not_started.setdefault(_name_of_planned(row), _experiment_of(row))
            continue
        run = _run(row)
        names.add(run.name)
        known = found.get(run.run_id)
        found[run.run_id] = (run, row) if known is None else _the_one_with_a_result(known, (run, row))
    waiting = tuple(name for name in not_started if name not in names)  # another table may have the run of a planned cell
    runs = tuple(run for run, _ in found.values())
    # In the order of names: a table made from these rows has them in another order, and is to be read as the same experiment.
    experiment, baseline = ", ".join(sorted(experiments)), baselines.pop() if len(baselines) == 1 else None
    return StoredRuns(experiment, runs, waiting, baseline, {name: not_started[name] for name in waiting})


def _experiment_of(row: CsvRow) -> str:
    return row.text("experiment") or row.path.stem


def _the_one_with_a_result(known: tuple[StoredRun, CsvRow], again: tuple[StoredRun, CsvRow]) -> tuple[StoredRun, CsvRow]:
    """Returns the row of a run that two tables have which has its result. Two different results are an error."""
    if known[0].record is None or again[0].record is None:
        return again if known[0].record is None else known
    row, earlier = again[1], known[1]
    for column in RECORD_COLUMNS:
        if repr(getattr(known[0].record, column)) != repr(getattr(again[0].record, column)):
            where = f"row {earlier.number} of {earlier.path} has the same run with {earlier.text(column)!r}"
            raise row.error(column, f"{row.text(column)!r}, but {where}; keep the right one of both rows")
    return known


def _name_of_planned(row: CsvRow) -> str:
    if row.text("status") != PLANNED:
        raise row.error("run_id", f"empty; every run has an id, and cells without a run have the status {PLANNED!r}")
    return row.text("name")


def _run(row: CsvRow) -> StoredRun:
    look = row.json("family_appearance", dict)
    if look and not ("title" in look and all(isinstance(value, str) for value in look.values())):
        raise row.error("family_appearance", f"{row.text('family_appearance')!r} has no title, or a value that is no text")
    settings = {key: text for key, text in row.cells.items() if text and key.startswith(("model.", "train."))}
    if (requested := row.value("model.n_params", int)) is not None:
        settings["model.n_params"] = str(requested)  # 3e4 is a whole number, too
    row.value("n_workers", int)
    for key in NUMBERS:
        row.value(key, float)
    return StoredRun(
        run_id=row.text("run_id"),
        name=row.text("name"),
        status=row.text("status"),
        record=_record(row),
        params=settings | ({SOURCE: row.text(SOURCE)} if row.text(SOURCE) else {}),
        appearance=row.text("family_appearance"),
        started_ms=row.time_ms("started"),
        ended_ms=row.time_ms("ended"),
        n_workers=row.text("n_workers"),
        git_commit=row.text("git_commit"),
        experiment=_experiment_of(row),
    )


def _record(row: CsvRow) -> RunRecord | None:
    """Returns the record of a run; None if the run has none, because it had not ended."""
    row.json("widths", dict)
    values = {f.name: row.value(f.name, f.type) for f in RECORD}  # pyright: ignore[reportArgumentType]
    values = {name: value for name, value in values.items() if value is not None}
    if not set(values) - {"status"}:
        return None
    for column in IN_EVERY_RECORD:
        if column not in values:
            raise row.error(column, "empty, although other columns have the result of this run")
    if values["n_params"] < 1:
        raise row.error("n_params", f"{row.text('n_params')!r} is not positive")
    if values["tokens"] < 0 or (values["tokens"] == 0 and values.get("status") == COMPLETE):
        raise row.error("tokens", f"{row.text('tokens')!r} is not positive")
    return RunRecord(**values)
