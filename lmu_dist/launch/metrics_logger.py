"""The only writer of the metrics logs of some runs: a Ray actor on the node of their driver.

Rank 0 of the workers calls it without waiting; it appends to the runs' logs and uploads them to MLflow. So workers need no
MLflow, no credentials and no disk shared with the driver, and the actor outlives them.
"""

import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from filelock import FileLock
from ray.actor import ActorProxy

from lmu_dist import storage
from lmu_dist.config import Folder
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.upload import MLflowUploader, set_client_limits


class LoggedRun(NamedTuple):
    """A run to log. `last_steps`: the last step of each metric in MLflow, where this machine lacks the metrics log."""

    folder: Folder
    run_id: str
    last_steps: dict[str, int]


class MetricsLogger:
    """The actor. Its methods are those of RunLogger, with the index of the run first.

    When a call has returned, its entry is on disk; a call other than log_metrics also copies the log to a run's folder at a
    URI. Ray runs the calls of one caller in order.
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
        self._uploaders = [MLflowUploader(log, uri) for log in self._logs]
        self._latest: dict[str, float] = {}

    @ray.method
    def start_run(self, run_index: int) -> None:
        """Sets the status of the MLflow run to RUNNING."""
        self._logs[run_index].start_run()
        self._logs[run_index].copy_to_storage()

    @ray.method
    def start_attempt(self, run_index: int, tags: Mapping[str, Any]) -> None:
        """Counts a start of the run's workers in the tag `lmu.attempt`, and sets further tags."""
        self._logs[run_index].start_attempt(tags)
        self._logs[run_index].copy_to_storage()

    @ray.method
    def log_params(self, run_index: int, values: Mapping[str, Any]) -> None:
        """Logs constants of the run."""
        self._logs[run_index].log_params(values)
        self._logs[run_index].copy_to_storage()

    @ray.method
    def log_metrics(self, run_index: int, step: int, values: Mapping[str, float]) -> None:
        """Logs metric values of a step, except those already logged."""
        self._logs[run_index].log_metrics(step, values)
        self._latest |= {"step": step, **values}

    @ray.method
    def set_tags(self, run_index: int, values: Mapping[str, Any]) -> None:
        """Sets tags."""
        self._logs[run_index].set_tags(values)
        self._logs[run_index].copy_to_storage()

    @ray.method
    def log_dataset(self, run_index: int, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Logs the dataset the run trains on."""
        self._logs[run_index].log_dataset(name, digest, source, profile)
        self._logs[run_index].copy_to_storage()

    @ray.method
    def log_table(self, run_index: int, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Logs a table as artifacts name.json and name.csv."""
        self._logs[run_index].log_table(name, columns)
        self._logs[run_index].copy_to_storage()

    @ray.method
    def end_run(self, run_index: int, status: str) -> None:
        """Ends the MLflow run with a status of `lmu_dist.records`."""
        self._logs[run_index].end_run(status)
        self._logs[run_index].copy_to_storage()

    @ray.method
    def latest(self) -> dict[str, float]:
        """The newest value of every metric, and its step."""
        return self._latest

    @ray.method
    def close(self, timeout_seconds: float) -> str:
        """Uploads the pending entries of all logs. Returns "" when all are in MLflow, else the reason why some are not."""
        deadline = time.monotonic() + timeout_seconds
        errors = [uploader.close(max(0.1, deadline - time.monotonic())) for uploader in self._uploaders]
        for log in self._logs:
            log.copy_to_storage()
        return next((error for error in errors if error), "")


class RemoteRunLogger:
    """A RunLogger that calls the actor for one run. Its methods return at once; only `flush` waits."""

    def __init__(self, actor: ActorProxy[MetricsLogger], run_index: int) -> None:
        self._actor, self._run_index = actor, run_index
        self._last_call: ray.ObjectRef[None] | None = None

    def start_run(self) -> None:
        """Sets the status of the MLflow run to RUNNING."""
        self._last_call = self._actor.start_run.remote(self._run_index)

    def start_attempt(self, tags: Mapping[str, Any]) -> None:
        """Counts a start of the run's workers in the tag `lmu.attempt`, and sets further tags."""
        self._last_call = self._actor.start_attempt.remote(self._run_index, tags)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Logs constants of the run."""
        self._last_call = self._actor.log_params.remote(self._run_index, values)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metric values of a step, except those already logged."""
        self._last_call = self._actor.log_metrics.remote(self._run_index, step, values)

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags."""
        self._last_call = self._actor.set_tags.remote(self._run_index, values)

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Logs the dataset the run trains on."""
        self._last_call = self._actor.log_dataset.remote(self._run_index, name, digest, source, profile)

    def log_table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Logs a table as artifacts name.json and name.csv."""
        self._last_call = self._actor.log_table.remote(self._run_index, name, columns)

    def end_run(self, status: str) -> None:
        """Ends the MLflow run with a status of `lmu_dist.records`."""
        self._last_call = self._actor.end_run.remote(self._run_index, status)

    def flush(self) -> None:
        """Waits until every entry logged so far is on the actor's disk. Raises RayError if the actor is gone."""
        if self._last_call is not None:
            ray.get(self._last_call)  # calls of one caller run in order, so the earlier ones are done too


def metrics_log_lock(folder: Folder) -> FileLock:
    """The file lock that a process holds while it writes the metrics log of a run."""
    local = storage.local_state_dir(folder)
    storage.make_folder(local)
    return FileLock(local / "metrics_log.lock")
