"""The one writer of the records of some runs: a Ray actor beside their driver that spools what rank 0 tells and delivers it.

Workers need no MLflow, no credentials and no shared disk for it, and it outlives them.
"""

import os
import time
from typing import Any, NamedTuple

from filelock import FileLock

from lmu_dist import storage
from lmu_dist.config import Folder
from lmu_dist.tracking.delivery import Courier, set_client_limits
from lmu_dist.tracking.spool import Spool


class Recorded(NamedTuple):
    """A run to be recorded: its folder, its MLflow run, the steps MLflow has of it where the folder has no spool."""

    folder: Folder
    run_id: str
    last_steps: dict[str, int]


class Recorder:
    """Owns the spools of some runs, by their index; started as an actor. Calls from one caller arrive in order."""

    def __init__(self, runs: list[Recorded], uri: str, environment: dict[str, str]) -> None:
        # By argument and not by runtime environment, which the dashboard would show.
        os.environ.update(environment)
        set_client_limits()
        # The recorder of a driver that was killed a moment ago may still live; two would tell everything twice.
        self._locks = [spool_lock(run.folder) for run in runs]
        for lock in self._locks:
            lock.acquire(timeout=120)
        self._spools = [Spool(run.folder, run.run_id, run.last_steps) for run in runs]
        self._couriers = [Courier(spool, uri) for spool in self._spools]
        self._latest: dict[str, float] = {}

    def tell(self, index: int, kind: str, *arguments: Any) -> None:
        """Spools one thing of a run; `kind` is a method of Spool. When this has returned, it is on disk; if it is no metric, it
        and all before it are in the run's folder.
        """
        getattr(self._spools[index], kind)(*arguments)
        if kind == "metrics":
            self._latest |= {"step": arguments[0], **arguments[1]}
        else:
            self._spools[index].copy()

    def latest(self) -> dict[str, float]:
        """The newest value of every metric, and its step."""
        return self._latest

    def close(self, timeout_seconds: float) -> str:
        """Delivers what is left; "" or the reason why something still waits in a spool."""
        deadline = time.monotonic() + timeout_seconds
        reasons = [courier.close(max(0.1, deadline - time.monotonic())) for courier in self._couriers]
        for spool in self._spools:
            spool.copy()
        return next((reason for reason in reasons if reason), "")


def spool_lock(folder: Folder) -> FileLock:
    """Held by whoever writes a run's spool."""
    here = storage.beside(folder)
    storage.make_folder(here)
    return FileLock(here / "spool.lock")
