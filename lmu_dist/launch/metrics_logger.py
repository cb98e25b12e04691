"""The only writer of the metrics logs of some runs: a Ray actor on the node of their driver.

Rank 0 of the workers calls it without waiting; it appends to the runs' logs and uploads them to MLflow. So workers need no
MLflow, no credentials and no disk shared with the driver, and the actor outlives them.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import ray
from filelock import FileLock
from ray.actor import ActorProxy

from lmu_dist import storage
from lmu_dist.config import FailedError, Folder
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.new_run import RunIdentity
from lmu_dist.tracking.upload import MLflowUploader, set_client_limits

CHECK_SECONDS = 2.0  # between two checks of a RemoteRunLogger whether its entries could be written


class LoggedRun(NamedTuple):
    """A run to log. `last_steps`: the last step of each metric in MLflow, where this machine lacks the metrics log."""

    folder: Folder
    run_id: str | None  # None: the uploader finds or creates the run of this identity
    identity: RunIdentity
    last_steps: dict[str, int]


class UploadState(NamedTuple):
    """What MLflow has of a run: "" or why some entries are not uploaded yet, and notes about entries that never will be."""

    not_uploaded: str
    notes: list[str]


class MetricsLogger:
    """The actor. Its methods are those of RunLogger, with the index of the run first.

    When a call has returned, its entry is in the log, and after `flush` on the disk; a call other than log_metrics also copies
    the log to a run's folder at a URI. Ray runs the calls of one caller in order.
    """

    def __init__(self, runs: list[LoggedRun], uri: str, environment: dict[str, str]) -> None:
        # Passed as an argument, since the dashboard would show a runtime environment, and this one holds credentials.
        os.environ.update(environment)
        set_client_limits()
        # The actor of a driver that was killed a moment ago may still be alive; two writers would log everything twice.
        self._locks = [metrics_log_lock(run.folder) for run in runs]
        for lock in self._locks:
            lock.acquire(timeout=120)
        self._logs = [MetricsLog(run.folder, run.run_id, run.last_steps) for run in runs]
        self._uploaders = [MLflowUploader(log, uri, run.identity) for log, run in zip(self._logs, runs, strict=True)]
        self._latest: dict[str, float] = {}

    @ray.method
    def start_run(self, run_index: int) -> None:
        """Sets the status of the MLflow run to RUNNING."""
        with self._writing(run_index) as log:
            log.start_run()

    @ray.method
    def start_attempt(self, run_index: int, attempt_id: str, tags: Mapping[str, Any]) -> None:
        """Counts a start of the run's workers in the tag `lmu.attempt`, once per id, and sets further tags."""
        with self._writing(run_index) as log:
            log.start_attempt(attempt_id, tags)

    @ray.method
    def log_params(self, run_index: int, values: Mapping[str, Any]) -> None:
        """Logs constants of the run."""
        with self._writing(run_index) as log:
            log.log_params(values)

    @ray.method
    def log_metrics(self, run_index: int, step: int, values: Mapping[str, float]) -> None:
        """Logs metric values of a step, except those already logged."""
        with suppress(FailedError):  # see _writing
            self._logs[run_index].log_metrics(step, values)
        self._latest |= {"step": step, **values}

    @ray.method
    def set_tags(self, run_index: int, values: Mapping[str, Any]) -> None:
        """Sets tags."""
        with self._writing(run_index) as log:
            log.set_tags(values)

    @ray.method
    def log_dataset(self, run_index: int, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Logs the dataset the run trains on."""
        with self._writing(run_index) as log:
            log.log_dataset(name, digest, source, profile)

    @ray.method
    def log_table(self, run_index: int, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Logs a table as artifacts name.json and name.csv."""
        with self._writing(run_index) as log:
            log.log_table(name, columns)

    @ray.method
    def end_run(self, run_index: int, status: str) -> None:
        """Ends the MLflow run with a status of `lmu_dist.records`."""
        with self._writing(run_index) as log:
            log.end_run(status)

    @ray.method
    def flush(self, run_index: int) -> None:
        """Waits until all entries are on the disk, and at a URI also in storage. Raises FailedError if one is not."""
        self._logs[run_index].flush()
        self._logs[run_index].copy_to_storage()

    @ray.method
    def check(self, run_index: int) -> None:
        """Raises FailedError if an entry of the run's current attempt could not be written."""
        self._logs[run_index].check()

    @ray.method
    def latest(self) -> dict[str, float]:
        """The newest value of every metric, and its step."""
        return self._latest

    @ray.method
    def close(self, timeout_seconds: float) -> list[UploadState]:
        """Uploads the pending entries of all logs. Returns what MLflow has of each run."""
        deadline = time.monotonic() + timeout_seconds
        errors = [uploader.close(max(0.1, deadline - time.monotonic())) for uploader in self._uploaders]
        for log in self._logs:
            log.copy_to_storage()
        return [UploadState(error, log.notes()) for error, log in zip(errors, self._logs, strict=True)]

    @contextmanager
    def _writing(self, run_index: int) -> Iterator[MetricsLog]:
        # The caller does not wait for the answer, and Ray would print the traceback of an error that nobody asks for. The log
        # remembers that an entry could not be written: `check` and `flush` raise it.
        with suppress(FailedError):
            yield self._logs[run_index]
        self._logs[run_index].copy_to_storage()


class RemoteRunLogger:
    """A RunLogger that calls the actor for one run. Its methods return at once; only `flush` waits.

    `log_metrics` raises FailedError some seconds after an entry could not be written, because the disk is full or broken.
    """

    def __init__(self, actor: ActorProxy[MetricsLogger], run_index: int) -> None:
        self._actor, self._run_index = actor, run_index
        self._check: ray.ObjectRef[None] | None = None
        self._last_check = time.monotonic()

    def start_run(self) -> None:
        """Sets the status of the MLflow run to RUNNING."""
        self._actor.start_run.remote(self._run_index)

    def start_attempt(self, attempt_id: str, tags: Mapping[str, Any]) -> None:
        """Counts a start of the run's workers in the tag `lmu.attempt`, once per id, and sets further tags."""
        self._actor.start_attempt.remote(self._run_index, attempt_id, tags)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Logs constants of the run."""
        self._actor.log_params.remote(self._run_index, values)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metric values of a step, except those already logged."""
        self._actor.log_metrics.remote(self._run_index, step, values)
        if time.monotonic() - self._last_check > CHECK_SECONDS:
            if self._check is not None:
                ray.get(self._check)
            self._check, self._last_check = self._actor.check.remote(self._run_index), time.monotonic()

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags."""
        self._actor.set_tags.remote(self._run_index, values)

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Logs the dataset the run trains on."""
        self._actor.log_dataset.remote(self._run_index, name, digest, source, profile)

    def log_table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Logs a table as artifacts name.json and name.csv."""
        self._actor.log_table.remote(self._run_index, name, columns)

    def end_run(self, status: str) -> None:
        """Ends the MLflow run with a status of `lmu_dist.records`."""
        self._actor.end_run.remote(self._run_index, status)

    def flush(self) -> None:
        """Waits until every entry logged so far is on the actor's disk.

        Raises FailedError if one could not be written, RayError if the actor is gone.
        """
        ray.get(self._actor.flush.remote(self._run_index))  # calls of one caller run in order, so the earlier ones are done


def metrics_log_lock(folder: Folder) -> FileLock:
    """The file lock that a process holds while it writes the metrics log of a run."""
    local = storage.local_state_dir(folder)
    storage.make_folder(local)
    return FileLock(local / "metrics_log.lock")
