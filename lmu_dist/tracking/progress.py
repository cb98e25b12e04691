"""The progress of an experiment, one row per cell, read from MLflow. For `lmu-dist status`.

Reads only the newest value of every metric, never a history.
"""

import time
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run

from lmu_dist import records
from lmu_dist.tracking.owner import HEARTBEAT_TIMEOUT_SECONDS
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import cells_of
from lmu_dist.tracking.tags import HEARTBEAT, KEY, STATUS

PLANNED, LOST = "planned", "lost"  # more states than a run has: not started; started, and without a recent heartbeat
ORDER = (records.RUNNING, LOST, records.INTERRUPTED, records.FAILED, records.WAITING, PLANNED)


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


def rows(store: Store, experiment: str) -> list[Row]:
    """All cells of an experiment, including those not started: running cells first, finished ones last."""
    own, elsewhere, planned = cells_of(store, experiment)
    found = {run.data.tags[KEY]: _row(run) for run in own}
    found |= {key: _row(run, "in another experiment") for key, run in elsewhere.items()}
    order = {state: i for i, state in enumerate(ORDER)}
    return sorted(
        [*found.values(), *map(_planned_row, planned)],
        key=lambda row: (order.get(row.state, len(order)), row.planned_tokens, row.name),
    )


def _planned_row(cell: dict[str, Any]) -> Row:
    return Row(
        name=cell["name"],
        key=cell["key"],
        run_id="",
        state=PLANNED,
        tokens=0,
        planned_tokens=cell["planned_tokens"],
        loss_nats=None,
        tokens_per_second=None,
        n_workers=cell["n_workers"],
        attempts=0,
        eta_seconds=None,
        remark="",
    )


def _row(run: Run, remark: str = "") -> Row:
    tags, metrics = run.data.tags, run.data.metrics
    state, planned = tags.get(STATUS, records.WAITING), int(run.data.params.get("planned_tokens", "0"))
    is_alive = time.time() - float(tags.get(HEARTBEAT, "0")) / 1000 < HEARTBEAT_TIMEOUT_SECONDS
    if state in (records.RUNNING, records.WAITING) and not is_alive:
        state = LOST
    tokens, speed = int(metrics.get(records.TRAIN_TOKENS, 0)), metrics.get(records.TOKENS_PER_SECOND)
    running = state == records.RUNNING
    remarks = [remark, tags.get("lmu.stop_rule", ""), "retry at half the learning rate" if tags.get("lmu.retry_of") else ""]
    return Row(
        name=tags.get("mlflow.runName", ""),
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
