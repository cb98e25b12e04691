"""Frees storage that no run needs any more: optimizer states of runs that have ended, and old branch points of their trunks.

What stays: the weights of every run, the latest branch point of every trunk, from which a later ladder with larger budgets
starts, and everything of runs that have not ended, also of those that a search stopped. Nothing but checkpoints is deleted,
under the lock of the trunk. Called by the command clean with an experiment, and by the driver of a run group when it has ended.
"""

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from filelock import Timeout
from platformdirs import user_cache_path

from lmu_dist import records, storage
from lmu_dist.config import Folder, open_folder
from lmu_dist.launch.cell import BRANCH_POINTS, Cell
from lmu_dist.launch.claim import FINAL_STATUSES, trunk_lock
from lmu_dist.launch.record import RECORD
from lmu_dist.tracking.owner import HEARTBEAT_TIMEOUT_SECONDS
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import cells_of
from lmu_dist.tracking.tags import FOLDER, HEARTBEAT, RUN_NAME, STATUS
from lmu_dist.train.checkpoint import NAME, CheckpointError, list_checkpoints, verify
from lmu_dist.train.kept_weights import keep_only_weights, weights_bytes

logger = logging.getLogger(__name__)

OPTIMIZER_STATE, BRANCH_POINT, CACHE = "optimizer state", "branch point", "cache"  # kinds of what is freed
CELL_FOLDER = re.compile(r"^[\d.e+]+[kMB]?-[0-9a-f]{12}$")  # see Cell.folder
CELL_NAME = re.compile(r"^(?P<model>.+)-[^-]+-(?P<seed>s\d+)-[0-9a-f]{12}$")  # see Cell.name
CACHES = ("files", "legendre", "verified")  # folders of the user's cache whose files are made again when they are needed


@dataclass(frozen=True)
class Item:
    """Something that can be freed."""

    kind: str
    path: str
    n_bytes: int


@dataclass(frozen=True)
class Cleaning:
    """What can be freed, or was, and why other parts of the experiment were left as they are."""

    items: tuple[Item, ...]
    left: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """The bytes of all items."""
        return sum(item.n_bytes for item in self.items)


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
        for item, path in _freeable(first.trunk_folder, {cell.folder.name for cell in unfinished}, steps):
            _free(item, path)
    except Exception as e:
        if not isinstance(e, OSError | CheckpointError) and not storage.is_storage_client_error(e):
            raise
        logger.warning("%s was not tidied: %s", first.trunk_folder, storage.error_text(e))


def clean(store: Store, experiment: str, delete: bool) -> Cleaning:
    """Finds what can be freed of an experiment, and frees it if `delete`. Raises ConfigError if there is no such experiment.

    A trunk that is being trained is left as it is. So are the branch points of a trunk of which a run has not ended or not
    started.
    """
    own, _, planned = cells_of(store, experiment)
    trunks, left = defaultdict[str, list[Any]](list), list[str]()
    for run in own:
        if (folder := run.data.tags.get(FOLDER)) is not None:
            trunks[str(open_folder(folder).parent)].append(run)
    waiting = {_trunk_name(cell["name"]) for cell in planned}
    waiting |= {_trunk_name(run.data.tags.get(RUN_NAME, "")) for run in own if run.data.tags.get(STATUS) not in FINAL_STATUSES}
    items = list[Item]()
    for name, runs in sorted(trunks.items()):
        trunk = open_folder(name)
        if not trunk.is_dir():
            left.append(f"{trunk} is not on this machine")
            continue
        if any(_is_being_trained(run) for run in runs):
            left.append(f"{trunk} is being trained")
            continue
        try:
            with trunk_lock(trunk, 0):
                has_waiting = any(trunk.name.startswith(prefix) for prefix in waiting if prefix)
                for item, path in _freeable(trunk, set(), None if has_waiting else []):
                    if delete:
                        _free(item, path)
                    items.append(item)
        except Timeout:
            left.append(f"{trunk} is being trained")
    return Cleaning(tuple(items), tuple(left))


def clean_cache(delete: bool) -> Cleaning:
    """Finds what can be freed of the user's cache on this machine, and frees it if `delete`.

    A run that has opened its files goes on without them. The folder local-state is left: it has the logs and locks of runs
    whose storage is at a URI.
    """
    items, cache = list[Item](), user_cache_path("lmu-dist")
    for folder in (cache / name for name in CACHES):
        if n_bytes := storage.n_bytes(folder):
            items.append(Item(CACHE, str(folder), n_bytes))
        for path in folder.rglob("*") if delete else ():
            if path.suffix not in (".lock", ".partial") and not path.is_dir():  # of processes that are writing
                path.unlink(missing_ok=True)
    return Cleaning(tuple(items))


def _freeable(trunk: Folder, unfinished: set[str], needed_steps: Sequence[int] | None) -> Iterator[tuple[Item, Folder]]:
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


def _free(item: Item, path: Folder) -> None:
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


def _trunk_name(cell_name: str) -> str:
    """The start of the names of the trunks that a cell may be in: family, size and seed; "" for a name of another form."""
    match = CELL_NAME.match(cell_name)
    return f"{match['model']}-{match['seed']}-" if match else ""


def _is_being_trained(run: Any) -> bool:
    """Whether a driver, perhaps on another machine, has just sent a heartbeat of an MLflow run that has not ended."""
    tags = run.data.tags
    is_recent = time.time() - float(tags.get(HEARTBEAT, "0")) / 1000 < HEARTBEAT_TIMEOUT_SECONDS
    return is_recent and tags.get(STATUS) in (records.RUNNING, records.WAITING)
