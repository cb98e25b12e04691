"""Frees storage that the runs of a trunk do not need any more: optimizer states of ended runs, and old branch points.

What stays: the weights of every run, the latest branch point of every trunk, from which a later ladder with larger budgets
starts, and everything of runs that have not ended, also of those that a search stopped. Nothing but checkpoints is deleted,
under the lock of the trunk. Called by the driver of a run group when it has ended, and by clean.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lmu_dist import storage
from lmu_dist.config import Folder
from lmu_dist.launch.cell import BRANCH_POINTS, Cell
from lmu_dist.launch.record import FINAL_STATUSES, RECORD
from lmu_dist.train.checkpoint import NAME, CheckpointError, list_checkpoints, verify
from lmu_dist.train.kept_weights import keep_only_weights, weights_bytes

logger = logging.getLogger(__name__)

OPTIMIZER_STATE, BRANCH_POINT = "optimizer state", "branch point"  # kinds of what is freed
CELL_FOLDER = re.compile(r"^[\d.e+]+[kMB]?-[0-9a-f]{12}$")  # see Cell.folder


@dataclass(frozen=True)
class Item:
    """Something that can be freed."""

    kind: str
    path: str
    n_bytes: int


def after_run(cells: Sequence[Cell]) -> None:
    """Frees what the runs of a trunk that have ended leave behind, unless cluster.keep_optimizer_state is set.

    `cells`: all that the driver plans to train in the trunk. The caller holds the lock of the trunk. A storage that fails costs
    no result: there is a warning only.
    """
    first = cells[0]
    if first.config.cluster.keep_optimizer_state:
        return
    unfinished = [cell for cell in cells if not _has_ended(cell.folder)]
    steps = [cell.config.train.decay_start for cell in unfinished if cell.config.train.schedule == "wsd"]
    try:
        for item, path in freeable(first.trunk_folder, {cell.folder.name for cell in unfinished}, steps):
            free(item, path)
    except Exception as e:
        if not isinstance(e, OSError | CheckpointError) and not storage.is_storage_client_error(e):
            raise
        logger.warning("%s was not tidied: %s", first.trunk_folder, storage.error_text(e))


def freeable(trunk: Folder, unfinished: set[str], needed_steps: Sequence[int] | None) -> Iterator[tuple[Item, Folder]]:
    """What can be freed of a trunk, and the folder of each.

    `unfinished`: names of folders of cells that are known not to have ended. `needed_steps`: the steps at which their decays
    start; None: all branch points are needed. If any other cell has not ended, all of them are needed too.
    """
    for folder in sorted((path for path in trunk.iterdir() if CELL_FOLDER.match(path.name)), key=lambda path: path.name):
        if _has_ended(folder):
            checkpoints = list_checkpoints(folder)
            if newest := next((path for path in checkpoints if _is_complete(path)), None):
                n_bytes = sum(map(storage.n_bytes, checkpoints)) - weights_bytes(newest)
                yield Item(OPTIMIZER_STATE, str(folder), n_bytes), folder
        elif folder.name not in unfinished:
            needed_steps = None
    if needed_steps is None:
        return
    branch_points = list_checkpoints(trunk / BRANCH_POINTS)
    intact = [path for path in branch_points if _is_complete(path)]
    kept = intact[:1]
    for step in needed_steps:
        kept += [path for path in intact if _step(path) <= step][:1]
    for path in branch_points:
        if intact and _step(path) < _step(intact[0]) and path not in kept:
            yield Item(BRANCH_POINT, str(path), storage.n_bytes(path)), path


def free(item: Item, path: Folder) -> None:
    """Frees what `freeable` found."""
    if item.kind == OPTIMIZER_STATE:
        keep_only_weights(path)
    else:
        storage.remove(path)


def _has_ended(cell_folder: Folder) -> bool:
    """Whether the run of a cell has ended and is never continued."""
    try:
        return json.loads((cell_folder / RECORD).read_text())["status"] in FINAL_STATUSES
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a damaged record is deleted by hand, and the run goes on
        return False


def _is_complete(checkpoint: Folder) -> bool:
    with suppress(CheckpointError):
        verify(checkpoint, digests=False)
        return True
    return False


def _step(checkpoint: Folder) -> int:
    return int(NAME.match(checkpoint.name)[1])  # pyright: ignore[reportOptionalSubscript]
