"""The one writer of a run's record: a Ray actor beside the driver that spools what rank 0 tells and delivers it.

Workers need no MLflow, no credentials and no shared disk for it, and it outlives them.
"""

import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from lmu_dist.tracking.delivery import Courier, limit_retries
from lmu_dist.tracking.spool import Spool


class Recorder:
    """Owns the spool of one run; started as an actor. Calls from one caller arrive in order."""

    def __init__(self, folder: str, run_id: str, uri: str, last_steps: dict[str, int], environment: dict[str, str]) -> None:
        # By argument and not by runtime environment, which the dashboard would show.
        os.environ.update(environment)
        limit_retries()
        # The recorder of a driver that was killed a moment ago may still live; two would tell everything twice.
        self._lock = FileLock(Path(folder) / "spool.lock")
        self._lock.acquire(timeout=120)
        self._spool = Spool(Path(folder), run_id, last_steps)
        self._courier = Courier(self._spool, uri)
        self._latest: dict[str, float] = {}

    def tell(self, kind: str, *arguments: Any) -> None:
        """Spools one thing; `kind` is a method of Spool. When this has returned, it is on disk."""
        getattr(self._spool, kind)(*arguments)
        if kind == "metrics":
            self._latest |= {"step": arguments[0], **arguments[1]}

    def latest(self) -> dict[str, float]:
        """The newest value of every metric, and its step."""
        return self._latest

    def close(self, timeout_seconds: float) -> str:
        """Delivers what is left; "" or the reason why something still waits in the spool."""
        return self._courier.close(timeout_seconds)
