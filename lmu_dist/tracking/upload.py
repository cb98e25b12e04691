"""Uploads a MetricsLog to MLflow: a thread sends the pending entries whenever the server answers.

An upload may be repeated without harm: MLflow drops metric points that it has already, and all other entries set a value
instead of adding one.
"""

import json
import os
import threading
import time
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lmu_dist.config import FailedError, open_folder
from lmu_dist.records import COMPLETE, DIVERGED, FAILED
from lmu_dist.tracking.errors import OUTAGE_TIMEOUT_SECONDS, STILL_RUNNING, one_line
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.new_run import find_or_create_run
from lmu_dist.tracking.owner import heartbeat_now
from lmu_dist.tracking.run_file import save_run_id
from lmu_dist.tracking.run_identity import RunIdentity
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.tags import HEARTBEAT

MLFLOW_STATUS = {COMPLETE: "FINISHED", FAILED: "FAILED", DIVERGED: "FAILED"}  # any other status: KILLED
# Error codes of a refusal: while the run is active, a retry gets the same answer. Any other error is retried as an outage.
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
RUN_IS_GONE = "RESOURCE_DOES_NOT_EXIST"
HEARTBEAT_SECONDS = 20.0  # between two heartbeats of a run
MAX_METRICS, MAX_PARAMS = 1000, 100  # of one log_batch
CANCEL_SECONDS = 1.0  # how long `cancel` waits for the thread


def upload(log: MetricsLog, store: Store, identity: RunIdentity | None = None) -> None:
    """Uploads the pending entries of a log, after finding or creating its MLflow run if it is not known.

    Raises any error of MLflow or of the database behind it; a later call uploads the rest. Raises BusyError if the run has
    another owner. `identity`: needed only if the log may have no run.
    """
    if log.run_id is None:
        assert identity is not None
        run_id = find_or_create_run(store, identity)
        save_run_id(open_folder(identity.folder), store.uri, run_id)
        log.assign_run(run_id)
    try:
        upload_pending(log, store.connect())
    except MlflowException as e:
        if e.error_code == RUN_IS_GONE and identity is not None:
            log.run_id = None  # the store was replaced by another: the next call makes the run again
        raise


def upload_pending(log: MetricsLog, client: MlflowClient) -> None:
    """Uploads the pending entries of a log, in order. Nothing is lost if it fails.

    Raises MlflowException in an outage, FailedError if the run was deleted in MLflow.
    """
    batch: list[Metric] = []
    batch_end = 0  # byte position in the log
    for position, entry in log.pending():
        if entry["kind"] == "metrics":
            points = [Metric(k, v, entry["time_ms"], entry["step"]) for k, v in entry["values"].items()]
            if len(batch) + len(points) > MAX_METRICS:
                _upload_metrics(log, client, batch, batch_end)
                batch = []
            batch += points
        else:
            _upload_metrics(log, client, batch, batch_end)
            batch = []
            _upload_entry(log, client, entry)
            log.mark_uploaded(position)
        batch_end = position
    _upload_metrics(log, client, batch, batch_end)


def _upload_metrics(log: MetricsLog, client: MlflowClient, batch: list[Metric], batch_end: int) -> None:
    if not batch:
        return
    try:
        client.log_batch(log.known_run_id, metrics=batch)
    except MlflowException as e:
        _check_refused(e, log, client)
        _upload_one_by_one(log, client, batch)
    log.mark_uploaded(batch_end)


def _upload_one_by_one(log: MetricsLog, client: MlflowClient, batch: list[Metric]) -> None:
    """Uploads the points of a refused batch one at a time, so that only those that MLflow refuses are left out."""
    for m in batch:
        try:
            client.log_batch(log.known_run_id, metrics=[m])
        except MlflowException as e:
            _check_refused(e, log, client)
            log.write_refused({"kind": "metrics", "step": m.step, "values": {m.key: m.value}}, one_line(e))


def _upload_entry(log: MetricsLog, client: MlflowClient, entry: dict[str, Any]) -> None:
    """Uploads an entry that holds no metrics. An entry that MLflow refuses goes to the log's file of refused entries."""
    run_id, kind = log.known_run_id, entry["kind"]
    try:
        if kind == "params":
            params = [Param(k, v) for k, v in entry["values"].items()]
            for i in range(0, len(params), MAX_PARAMS):
                client.log_batch(run_id, params=params[i : i + MAX_PARAMS])
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(k, v) for k, v in entry["values"].items()])
        elif kind == "dataset":
            profile, source = json.dumps(entry["profile"]), json.dumps({"uri": entry["source"]})
            dataset = Dataset(entry["name"], entry["digest"][:36], "local", source, profile=profile)
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        elif kind == "table":
            _upload_table(client, run_id, entry["name"], entry["columns"])
        elif kind == "start":
            client.update_run(run_id, status="RUNNING")
        elif kind == "end":
            client.set_terminated(run_id, MLFLOW_STATUS.get(entry["status"], "KILLED"))
    except MlflowException as e:
        _check_refused(e, log, client)
        log.write_refused(entry, one_line(e))


def _check_refused(error: MlflowException, log: MetricsLog, client: MlflowClient) -> None:
    """Returns if MLflow refuses an entry for good. Raises the error if it does not, FailedError if the run was deleted.

    MLflow refuses every entry of a deleted run with the code of a wrong entry, and takes them all once it is restored.
    """
    if error.error_code not in REFUSALS:
        raise error
    if client.get_run(log.known_run_id).info.lifecycle_stage != "active":
        restore = f"`mlflow runs restore --run-id {log.run_id}` restores it"
        raise FailedError(f"the run was deleted in MLflow, alone or with its experiment; {restore}") from error


def _upload_table(client: MlflowClient, run_id: str, name: str, columns: dict[str, list[Any]]) -> None:
    rows = "\n".join(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))
    client.log_text(run_id, ",".join(columns) + "\n" + rows + "\n", f"{name}.csv")
    # log_table appends to a table that exists, and an upload may be repeated.
    if not any(a.path == f"{name}.json" for a in client.list_artifacts(run_id)):
        client.log_table(run_id, columns, f"{name}.json")


class MLflowUploader:
    """A thread that uploads a MetricsLog to MLflow as it grows. During an outage it retries, and training does not wait."""

    def __init__(
        self,
        log: MetricsLog,
        uri: str,
        identity: RunIdentity | None = None,
        interval_seconds: float = 1.0,
        retry_seconds: float = 5.0,
    ) -> None:
        """`identity`: with which the thread finds or creates the MLflow run of a log that has none yet."""
        self._log, self._store, self._identity = log, Store(uri), identity
        self._interval, self._retry = interval_seconds, retry_seconds
        self._stop, self._cancelled = threading.Event(), threading.Event()
        self.last_error = ""
        self._thread = threading.Thread(target=self._run, name="mlflow-uploader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last_heartbeat = 0.0
        while not self._cancelled.is_set():
            closing = self._stop.is_set()
            try:
                upload(self._log, self._store, self._identity)
                if not closing and time.monotonic() - last_heartbeat > HEARTBEAT_SECONDS:
                    self._store.client.set_tag(self._log.known_run_id, HEARTBEAT, heartbeat_now())
                    last_heartbeat = time.monotonic()
                self.last_error = ""
            except Exception as e:  # noqa: BLE001 - databases and object stores behind MLflow raise errors of their own
                self.last_error = one_line(e) or type(e).__name__
            if closing and not self.last_error:
                return
            if closing:
                self._cancelled.wait(self._retry)
            else:
                self._stop.wait(self._retry if self.last_error else self._interval)

    def upload_rest(self) -> str:
        """Asks the thread to upload the pending entries and to stop, and does not wait for it.

        Returns "" when all are in MLflow, else why not yet.
        """
        self._stop.set()
        return (self.last_error or STILL_RUNNING) if any(self._log.pending()) else ""

    def cancel(self) -> None:
        """Stops the thread after the entries that it is uploading. The log keeps what is not uploaded."""
        self._stop.set()
        self._cancelled.set()
        self._thread.join(CANCEL_SECONDS)

    def close(self, timeout_seconds: float) -> str:
        """Uploads the pending entries, then stops. Returns "" when all are in MLflow, else why not; the log keeps the rest."""
        self._stop.set()
        self._thread.join(min(timeout_seconds, OUTAGE_TIMEOUT_SECONDS) if self.last_error else timeout_seconds)
        self.cancel()
        return self.upload_rest()


def set_client_limits() -> None:
    """Sets short retries and timeouts for MLflow's client in this process, and turns its progress bars off.

    The client gives up after seconds instead of minutes: it is the MLflowUploader that retries.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
