"""The only writer of the metrics logs of a driver's runs: a Ray actor on the node of the processes that claim the runs.

Rank 0 of the workers calls it without waiting; it appends to the runs' logs and uploads them to MLflow. So workers need no
MLflow, no credentials and no disk shared with the driver, and the actor outlives them. It also finds and opens the runs in
MLflow for the processes that claim them: so an MLflow client, of 100 MB, is needed once and not in every trial.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from filelock import FileLock, Timeout
from ray.actor import ActorProxy
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmu_dist import garbage
from lmu_dist.config import FailedError, Folder
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.locks import metrics_log_lock
from lmu_dist.launch.record import FinishedRun
from lmu_dist.tracking.errors import OUTAGE_TIMEOUT_SECONDS, STILL_RUNNING
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.run_identity import LoggedRun

if TYPE_CHECKING:  # imports MLflow, which takes a second; workers and the processes that claim runs do not need it
    from lmu_dist.tracking.upload import MLflowUploader

CHECK_SECONDS = 2.0  # between two checks of a RemoteRunLogger whether its entries could be written
LOCK_SECONDS = 120.0  # how long the actor of a driver that was killed may stay alive
REOPEN_SECONDS = 10.0  # how long a call waits for the lock of a log: after a restart nobody else holds it
CLAIMS, N_CLAIMS = "claims", 8  # the threads that ask MLflow for runs, so that entries are written meanwhile


class UploadState(NamedTuple):
    """What MLflow has of a run: "" or why some entries are not uploaded yet, and notes about entries that never will be."""

    not_uploaded: str
    notes: list[str]


class MetricsLogger:
    """The actor. A run's log is opened by the first call for it and closed by `close`.

    When a call has returned, its entry is in the log, and after `flush` on the disk. If the process is killed, Ray starts it
    again and repeats the calls that were not answered, possibly after later ones: a MetricsLog writes no entry twice.
    """

    def __init__(self, uri: str, environment: dict[str, str]) -> None:
        garbage.collect_rarely()
        from lmu_dist.tracking.store import Store
        from lmu_dist.tracking.upload import set_client_limits

        # Passed as an argument, since the dashboard would show a runtime environment, and this one holds credentials.
        os.environ.update(environment)
        set_client_limits()
        self._uri, self._store = uri, Store(uri)
        self._runs: dict[str, _OpenRun] = {}  # by folder
        self._closed = set[str]()  # folders whose runs are not opened again by a call of their dying workers

    @ray.method(concurrency_group=CLAIMS)
    def claim(
        self, cells: Sequence[Cell], study: str, final_statuses: Sequence[str]
    ) -> tuple[dict[str, FinishedRun], tuple[LoggedRun, ...]]:
        """Finds the runs of cells that have ended, and opens MLflow runs for the others: see `claim.claim_runs`."""
        from lmu_dist.launch.claim import claim_runs

        return claim_runs(cells, self._store, study, final_statuses)

    @ray.method(concurrency_group=CLAIMS)
    def close_failed(self, cells: Sequence[Cell], study: str) -> None:
        """Closes the MLflow runs of cells that cannot go on: see `claim.close_failed`."""
        from lmu_dist.launch.claim import close_failed

        close_failed(cells, self._store, study)

    @ray.method
    def is_free(self, run: LoggedRun) -> bool:
        """Opens the log of a run. Returns False while another process writes it: the actor of a driver that was just killed."""
        self._closed.discard(str(run.folder))
        try:
            self._open(run, timeout_seconds=0)
        except Timeout:
            return False
        return True

    @ray.method
    def log(self, run: LoggedRun, method: str, *arguments: Any) -> None:
        """Calls a method of RunLogger for a run."""
        if (opened := self._open(run)) is None:
            return
        # The caller does not wait for the answer, and Ray would print the traceback of an error that nobody asks for. The log
        # remembers that an entry could not be written: `check` and `flush` raise it.
        with suppress(FailedError):
            getattr(opened.log, method)(*arguments)
        if method == "log_metrics":
            step, values, *_ = arguments
            opened.latest.update({"step": step, **values})

    @ray.method
    def flush(self, run: LoggedRun) -> None:
        """Waits until all entries are on the disk, and at a URI also in storage. Raises FailedError if one is not."""
        if (opened := self._open(run)) is not None:
            opened.log.flush()
            opened.log.copy_to_storage()

    @ray.method
    def check(self, run: LoggedRun) -> None:
        """Raises FailedError if an entry of the run's current attempt could not be written."""
        if (opened := self._open(run)) is not None:
            opened.log.check()

    @ray.method
    def latest(self, folders: Sequence[Folder]) -> dict[str, float]:
        """The newest value of every metric, and its step, of the last of these runs that has logged one."""
        latest = [self._runs[str(folder)].latest for folder in folders if str(folder) in self._runs]
        return next((values for values in reversed(latest) if values), {})

    @ray.method
    def upload_rest(self, run: LoggedRun) -> UploadState:
        """Starts the upload of the last entries of a run. Returns what MLflow has of it now, without waiting."""
        opened = self._open(run)
        return UploadState("", []) if opened is None else UploadState(opened.uploader.upload_rest(), opened.log.notes())

    @ray.method
    def close(self, folder: Folder) -> None:
        """Closes the log of a run, if it is open. What is not uploaded stays in the log, for the next start of its cell."""
        self._closed.add(str(folder))
        if (opened := self._runs.pop(str(folder), None)) is not None:
            opened.uploader.cancel()
            try:
                opened.log.copy_to_storage()
            finally:
                opened.lock.release()

    def _open(self, run: LoggedRun, timeout_seconds: float = REOPEN_SECONDS) -> "_OpenRun | None":
        """The log of a run, opened if need be; None if it was closed: the call is a late one of a dying worker."""
        from lmu_dist.tracking.upload import MLflowUploader

        name = str(run.folder)
        if name in self._closed:
            return None
        if name not in self._runs:
            lock = metrics_log_lock(run.folder)
            lock.acquire(timeout=timeout_seconds)
            log = MetricsLog(run.folder, run.run_id, run.last_steps)
            self._runs[name] = _OpenRun(lock, log, MLflowUploader(log, self._uri, run.identity), {})
        return self._runs[name]


class _OpenRun(NamedTuple):
    lock: FileLock  # two writers would log everything twice
    log: MetricsLog
    uploader: "MLflowUploader"
    latest: dict[str, float]


def start_metrics_logger(uri: str, node_id: str) -> ActorProxy[MetricsLogger]:
    """Starts the actor on a node; the driver's credentials for MLflow and object stores go with it."""
    node: Any = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options: Any = {"max_restarts": 100, "max_task_retries": 3, "concurrency_groups": {CLAIMS: N_CLAIMS}}
    actor_class = ray.remote(num_cpus=0, scheduling_strategy=node, **options)(MetricsLogger)
    return actor_class.remote(uri, {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "AWS_"))})


def close_logs(actor: ActorProxy[MetricsLogger], runs: Sequence[LoggedRun], timeout_seconds: float) -> list[UploadState]:
    """Closes the logs of some runs when their entries are in MLflow, or the time is over. Returns what MLflow has of each run.

    If MLflow fails, it waits no longer than OUTAGE_TIMEOUT_SECONDS. Raises RayError if the actor is gone.
    """
    began = time.monotonic()
    while True:
        states = ray.get([actor.upload_rest.remote(run) for run in runs])
        missing, seconds = {state.not_uploaded for state in states} - {""}, time.monotonic() - began
        if not missing or seconds > (timeout_seconds if missing == {STILL_RUNNING} else OUTAGE_TIMEOUT_SECONDS):
            break
        time.sleep(0.1)
    ray.get([actor.close.remote(run.folder) for run in runs])
    return states


def release_log(actor: ActorProxy[MetricsLogger], folder: Folder) -> None:
    """Closes the log of a run whose trial or workers have died, so that another process can write it."""
    if ray.is_initialized():  # else the actor is dead too
        with suppress(RayError):
            ray.get(actor.close.remote(folder))


class RemoteRunLogger:
    """A RunLogger that calls the actor for one run. Its methods return at once; only `flush` waits.

    `log_metrics` raises FailedError some seconds after an entry could not be written, because the disk is full or broken.
    """

    def __init__(self, actor: ActorProxy[MetricsLogger], run: LoggedRun) -> None:
        self._actor, self._run = actor, run
        self._unanswered: list[ray.ObjectRef[None]] = []
        self._last_check = time.monotonic()

    def start_run(self) -> None:
        """Sets the status of the MLflow run to RUNNING."""
        self._log("start_run")

    def start_attempt(self, attempt_id: str, tags: Mapping[str, Any]) -> None:
        """Counts a start of the run's workers in the tag `lmu.attempt`, once per id, and sets further tags."""
        self._log("start_attempt", attempt_id, tags)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Logs constants of the run."""
        self._log("log_params", values)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metric values of a step, except those already logged."""
        # The time is taken here: the actor may be busy, and write the entry seconds later.
        self._log("log_metrics", step, values, int(time.time() * 1000))
        if time.monotonic() - self._last_check > CHECK_SECONDS:
            answered, self._unanswered = ray.wait(self._unanswered, num_returns=len(self._unanswered), timeout=0)
            ray.get(answered)
            self._unanswered.append(self._actor.check.remote(self._run))
            self._last_check = time.monotonic()

    def log_curve(self, name: str, values: Sequence[float]) -> None:
        """Logs the values of a metric at the steps 1, 2, and so on."""
        self._log("log_curve", name, list(values))

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags."""
        self._log("set_tags", values)

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Logs the dataset the run trains on."""
        self._log("log_dataset", name, digest, source, profile)

    def log_table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Logs a table as artifacts name.json and name.csv."""
        self._log("log_table", name, columns)

    def end_run(self, status: str) -> None:
        """Ends the MLflow run with a status of `lmu_dist.records`."""
        self._log("end_run", status)

    def flush(self) -> None:
        """Waits until every entry logged so far is on the actor's disk.

        Raises FailedError if one could not be written, RayError if the actor is gone.
        """
        # Each call by itself: if the actor was killed meanwhile, Ray may repeat them after `flush`.
        ray.get(self._unanswered)
        self._unanswered = []
        ray.get(self._actor.flush.remote(self._run))

    def _log(self, method: str, *arguments: Any) -> None:
        self._unanswered.append(self._actor.log.remote(self._run, method, *arguments))
