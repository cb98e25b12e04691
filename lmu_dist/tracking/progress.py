"""The progress of an experiment, one row per cell, read from MLflow. For `lmu-dist status`.

Reads only the newest value of every metric, never a history, and of runs that have ended only those that it has not read yet.
"""

from typing import Any

from lmu_dist import records
from lmu_dist.tracking.ended_rows import LOST, Row, row_of, rows_of
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import planned_elsewhere, read_plans

PLANNED = "planned"  # a state that no run has: not started
ORDER = (records.RUNNING, LOST, records.INTERRUPTED, records.FAILED, records.WAITING, PLANNED, records.NOT_NEEDED)


def rows(store: Store, experiment: str) -> list[Row]:
    """All cells of an experiment, including those not started: running cells first, finished ones last."""
    found = {row.key: row for row in rows_of(store, experiment)}
    missing = {cell["key"]: cell for cell in read_plans(store, experiment) if cell["key"] not in found}
    elsewhere = planned_elsewhere(store, experiment, missing)
    found |= {key: row_of(run, "in another experiment") for key, run in elsewhere.items()}
    planned = [cell for key, cell in missing.items() if key not in elsewhere]
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
        state=records.NOT_NEEDED if cell.get("not_needed") else PLANNED,
        tokens=0,
        planned_tokens=cell["planned_tokens"],
        loss_nats=None,
        tokens_per_second=None,
        n_workers=cell["n_workers"],
        attempts=0,
        eta_seconds=None,
        remark="ladder.until" if cell.get("not_needed") else "",
    )
