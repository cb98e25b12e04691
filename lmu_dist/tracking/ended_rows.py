"""One row for each cell of an experiment that has a run: runs of MLflow in, rows out. For progress, which shows them.

Reading thousands of runs takes MLflow many seconds, and a run that has ended does not change. So the rows of ended runs are
kept in a file in the user's cache, and MLflow is asked only for runs that have not ended, and for those that have ended, were
deleted or were retired since. `keep_rows` fills the file from runs that a caller has read anyway.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mlflow.entities import Experiment, Run, ViewType
from platformdirs import user_cache_path

from lmu_dist import records
from lmu_dist.storage import write_atomic
from lmu_dist.tracking.experiments import find_experiment
from lmu_dist.tracking.owner import HEARTBEAT_TIMEOUT_SECONDS
from lmu_dist.tracking.store import CELLS, Store
from lmu_dist.tracking.tags import HEARTBEAT, KEY, RETIRED_KEY, RUN_NAME, STATUS

LOST = "lost"  # a state that no run has: started, and without a recent heartbeat
MAX_AGE_SECONDS = 24 * 3600.0  # of a file, so that nothing stays wrong for long
PAGE_RUNS = 100  # runs that are read at a time, those that ended last first, until all of them are known


@dataclass(frozen=True)
class Row:
    """The progress of one cell. `loss_nats` is the validation loss; before the first validation, the loss of the last step."""

    name: str
    key: str
    run_id: str
    state: str
    tokens: int
    planned_tokens: int
    loss_nats: float | None
    tokens_per_second: float | None
    n_workers: int
    attempts: int
    eta_seconds: float | None
    remark: str


def rows_of(store: Store, experiment: str) -> list[Row]:
    """The rows of all runs of cells of an experiment. Raises ConfigError if there is no such experiment."""
    with store.one_line_errors():
        found = find_experiment(store, experiment)
        ids = [found.experiment_id]
        gone, kept = _gone(store, ids), _read(_path(store, found))
        if kept is None or not kept.gone <= gone:  # a run that was gone is back, or `mlflow gc` has removed it
            rows, runs = dict[str, Row](), store.search_cells(ids)
        else:
            rows = {run_id: row for run_id, row in kept.rows.items() if run_id not in gone}
            is_live = (f"tags.`{STATUS}` != '{status}'" for status in records.ENDED)
            runs = [*_ended_since(store, ids, rows), *store.search_cells(ids, " AND ".join(is_live))]
    rows |= {run.info.run_id: row_of(run) for run in runs}
    live = {run.info.run_id for run in runs if not _has_ended(run)}
    now_kept = _Kept({run_id: row for run_id, row in rows.items() if run_id not in live}, gone)
    if kept != now_kept:
        _write(_path(store, found), now_kept)
    return list(rows.values())


def keep_rows(store: Store, experiment: str, runs: Iterable[Run]) -> None:
    """Keeps the rows of the ended ones of `runs`, which are all runs of cells of an experiment."""
    with store.one_line_errors():
        found = find_experiment(store, experiment)
        gone = _gone(store, [found.experiment_id])
    _write(_path(store, found), _Kept({run.info.run_id: row_of(run) for run in runs if _has_ended(run)}, gone))


def row_of(run: Run, remark: str = "") -> Row:
    """The row of a run. `remark`: what to say of it besides."""
    tags, metrics = run.data.tags, run.data.metrics
    state, planned = tags.get(STATUS, records.WAITING), int(run.data.params.get("planned_tokens", "0"))
    is_alive = time.time() - float(tags.get(HEARTBEAT, "0")) / 1000 < HEARTBEAT_TIMEOUT_SECONDS
    if state in (records.RUNNING, records.WAITING) and not is_alive:
        state = LOST
    tokens, speed = int(metrics.get(records.TRAIN_TOKENS, 0)), metrics.get(records.TOKENS_PER_SECOND)
    running = state == records.RUNNING
    remarks = [remark, tags.get("lmu.stop_rule", ""), "retry at half the learning rate" if tags.get("lmu.retry_of") else ""]
    return Row(
        name=tags.get(RUN_NAME, ""),
        key=tags[KEY],
        run_id=run.info.run_id,
        state=state,
        tokens=tokens,
        planned_tokens=planned,
        loss_nats=metrics.get(records.VAL_LOSS, metrics.get(records.TRAIN_LOSS)),
        tokens_per_second=speed,
        n_workers=int(tags.get("lmu.n_workers", "0")),
        attempts=int(tags.get("lmu.attempt", "0")),
        eta_seconds=(planned - tokens) / speed if running and speed else None,
        remark="; ".join(text for text in remarks if text),
    )


def _has_ended(run: Run) -> bool:
    """Whether a run has ended and MLflow has all of it."""
    return run.info.end_time is not None and run.data.tags.get(STATUS) in records.ENDED


def _gone(store: Store, ids: list[str]) -> set[str]:
    """The ids of the runs that were deleted or retired."""
    deleted = store.search_runs(ids, CELLS, ViewType.DELETED_ONLY)
    retired = store.search_runs(ids, f"tags.`{RETIRED_KEY}` LIKE '%'", ViewType.ALL)
    return {run.info.run_id for run in (*deleted, *retired)}


def _ended_since(store: Store, ids: list[str], kept: dict[str, Row]) -> list[Run]:
    """The runs that have ended since the rows were kept: pages of runs, last ended first, up to one without a new run."""
    found, token = list[Run](), None
    while True:
        order = ["attributes.end_time DESC"]
        page = store.client.search_runs(ids, CELLS, max_results=PAGE_RUNS, order_by=order, page_token=token)
        found += (new := [run for run in page if run.info.run_id not in kept and _has_ended(run)])
        if not new or not (token := page.token):
            return found


def _path(store: Store, experiment: Experiment) -> Path:
    """The file of an experiment. An experiment of another store at the same URI was created at another time."""
    name = json.dumps([store.uri, experiment.experiment_id, experiment.creation_time])
    return user_cache_path("lmu-dist") / "rows" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"


@dataclass(frozen=True)
class _Kept:
    """What a file has: the rows of ended runs by run id, and the ids of the runs that were gone."""

    rows: dict[str, Row]
    gone: set[str]


def _read(path: Path) -> _Kept | None:
    """What a file has; None if there is no file, or if it is too old, damaged or of another version."""
    try:
        if time.time() - path.stat().st_mtime > MAX_AGE_SECONDS:
            return None
        stored = json.loads(path.read_text())
        if stored["columns"] != [f.name for f in fields(Row)]:
            return None
        return _Kept({row.run_id: row for row in (Row(*values) for values in stored["rows"])}, set(stored["gone"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, kept: _Kept) -> None:
    """Writes a file. A cache that cannot be written costs only time."""
    columns = [f.name for f in fields(Row)]
    rows = [[getattr(row, column) for column in columns] for row in kept.rows.values()]
    content: dict[str, Any] = {"columns": columns, "rows": rows, "gone": sorted(kept.gone)}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content).encode())
