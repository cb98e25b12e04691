"""Frees storage that the runs of an experiment do not need any more, and the user's cache on this machine.

`tidy` says what can be freed of a trunk. Called by the command clean.
"""

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from filelock import Timeout
from platformdirs import user_cache_path

from lmu_dist import records, storage
from lmu_dist.config import open_folder
from lmu_dist.launch.locks import trunk_lock
from lmu_dist.launch.record import FINAL_STATUSES
from lmu_dist.launch.tidy import Item, free, freeable
from lmu_dist.tracking.owner import HEARTBEAT_TIMEOUT_SECONDS
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import cells_of
from lmu_dist.tracking.tags import FOLDER, HEARTBEAT, RESTORED_FROM, RUN_NAME, STATUS

CACHE = "cache"  # a kind of what is freed, besides those of tidy
CELL_NAME = re.compile(r"^(?P<model>.+)-[^-]+-(?P<seed>s\d+)-[0-9a-f]{12}$")  # see Cell.name
CACHES = ("files", "legendre", "verified")  # folders of the user's cache whose files are made again when they are needed


@dataclass(frozen=True)
class Cleaning:
    """What can be freed, or was, and why other parts of the experiment were left as they are."""

    items: tuple[Item, ...]
    left: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """The bytes of all items."""
        return sum(item.n_bytes for item in self.items)


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
    if n_restored := sum(RESTORED_FROM in run.data.tags and FOLDER not in run.data.tags for run in own):
        left.append(f"{n_restored:,} run{'s' * (n_restored > 1)} restored from a table of records: without files")
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
                for item, path in freeable(trunk, set(), None if has_waiting else []):
                    if delete:
                        free(item, path)
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


def _trunk_name(cell_name: str) -> str:
    """The start of the names of the trunks that a cell may be in: family, size and seed; "" for a name of another form."""
    match = CELL_NAME.match(cell_name)
    return f"{match['model']}-{match['seed']}-" if match else ""


def _is_being_trained(run: Any) -> bool:
    """Whether a driver, perhaps on another machine, has just sent a heartbeat of an MLflow run that has not ended."""
    tags = run.data.tags
    is_recent = time.time() - float(tags.get(HEARTBEAT, "0")) / 1000 < HEARTBEAT_TIMEOUT_SECONDS
    return is_recent and tags.get(STATUS) in (records.RUNNING, records.WAITING)
