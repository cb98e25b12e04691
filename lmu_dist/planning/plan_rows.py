"""The cells of a plan as the design needs them: from the cells of a grid, and to and from the rows of a plan in MLflow.

Called by launch/ladder, which writes the rows, by until and by cli/next.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from lmu_dist.config import to_dict
from lmu_dist.models import accounting
from lmu_dist.planning.cost import StepTime, step_seconds, step_settings
from lmu_dist.planning.design import PlannedCell
from lmu_dist.planning.grid import GridCell, trunk_settings

SECONDS_PER_HOUR = 3600.0


def planned_cell(
    cell: GridCell,
    key: str,
    name: str,
    trunk: str,
    seconds: float | None,
    n_params: int,
    training_flops: float,
) -> PlannedCell:
    """A cell of a grid with its price. `seconds` is the time of a step, if it is known; `training_flops` is per token."""
    config, train = cell.config, cell.config.train
    return PlannedCell(
        key=key,
        name=name,
        family=cell.shape.family,
        n_params=n_params,
        tokens=cell.trained_tokens,
        seed=config.seed,
        trunk=trunk,
        steps=train.n_steps,
        decay_start=train.decay_start if train.schedule == "wsd" else 0,
        step_flops=train.batch_tokens * training_flops,
        step_hours=seconds * config.cluster.n_workers / SECONDS_PER_HOUR if seconds is not None else None,
        n_workers=config.cluster.n_workers,
    )


def seconds_of_steps(cells: Sequence[GridCell], calibration: Sequence[StepTime]) -> list[float | None]:
    """The time of a step of every cell, None if it is unknown. Cells that take the same steps are counted once."""
    found = dict[str, float | None]()
    seconds = list[float | None]()
    for cell in cells:
        if not (calibration or cell.config.plan.flops_per_second):
            seconds.append(None)
            continue
        step = json.dumps(step_settings(cell), sort_keys=True)
        if step not in found:
            found[step] = step_seconds(cell, calibration)
        seconds.append(found[step])
    return seconds


def cells_of_grid(cells: Sequence[GridCell], calibration: Sequence[StepTime]) -> list[PlannedCell]:
    """The cells of a grid that has no corpus yet, and so no keys: they are numbered."""
    planned, seconds = list[PlannedCell](), seconds_of_steps(cells, calibration)
    for i, cell in enumerate(cells):
        tree = to_dict(cell.config)
        trunk = json.dumps([tree["model"], tree["seed"], trunk_settings(tree["train"])], sort_keys=True)
        n_params, flops = accounting.parameters(cell.shape).non_embedding, accounting.flops(cell.shape).training
        planned.append(planned_cell(cell, str(i), f"{cell.shape.family} {i}", trunk, seconds[i], n_params, flops))
    return planned


def to_row(cell: PlannedCell) -> dict[str, Any]:
    """The row of a plan in MLflow. `planned_tokens` is the name that `lmu-dist status` reads."""
    return asdict(cell) | {"planned_tokens": cell.tokens}


def from_rows(rows: Iterable[Mapping[str, Any]]) -> list[PlannedCell]:
    """The cells of the rows of a plan; without rows of earlier versions and of searches, which have no price."""
    names = [f.name for f in fields(PlannedCell)]
    return [PlannedCell(**{name: row[name] for name in names}) for row in rows if all(name in row for name in names)]
