"""From the spool to MLflow: a thread that sends what is pending whenever the server listens.

Delivering twice changes nothing: MLflow drops points that are equal, and everything else is set, not added.
"""

import json
import os
import threading
import time
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lmu_dist.records import COMPLETE, DIVERGED, FAILED
from lmu_dist.tracking.spool import Spool
from lmu_dist.tracking.store import ALIVE, alive_now, one_line

MLFLOW_STATUS = {COMPLETE: "FINISHED", FAILED: "FAILED", DIVERGED: "FAILED"}  # anything else: KILLED
# An answer with one of these will not change however often it is asked for; anything else is the network's fault.
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
ALIVE_SECONDS = 20.0  # between two signs of life of a run
MAX_METRICS, MAX_PARAMS = 1000, 100  # of one log_batch


def deliver(spool: Spool, client: MlflowClient) -> None:
    """Sends all that is pending, in order. Raises MlflowException when the server does not answer; nothing is lost then."""
    batch: list[Metric] = []
    reached = 0
    for position, entry in spool.pending():
        if entry["kind"] == "metrics":
            points = [Metric(k, v, entry["time_ms"], entry["step"]) for k, v in entry["values"].items()]
            if len(batch) + len(points) > MAX_METRICS:
                _send_metrics(spool, client, batch, reached)
                batch = []
            batch += points
        else:
            _send_metrics(spool, client, batch, reached)
            batch = []
            _send(spool, client, entry)
            spool.delivered(position)
        reached = position
    _send_metrics(spool, client, batch, reached)


def _send_metrics(spool: Spool, client: MlflowClient, batch: list[Metric], reached: int) -> None:
    if not batch:
        return
    try:
        client.log_batch(spool.run_id, metrics=batch)
    except MlflowException as e:
        if e.error_code not in REFUSALS:
            raise
        _send_one_by_one(spool, client, batch)
    spool.delivered(reached)


def _send_one_by_one(spool: Spool, client: MlflowClient, batch: list[Metric]) -> None:
    """What is left of a batch that holds something MLflow refuses: all but that."""
    for m in batch:
        try:
            client.log_batch(spool.run_id, metrics=[m])
        except MlflowException as e:
            if e.error_code not in REFUSALS:
                raise
            spool.refused({"kind": "metrics", "step": m.step, "values": {m.key: m.value}}, one_line(e))


def _send(spool: Spool, client: MlflowClient, entry: dict[str, Any]) -> None:
    run_id, kind = spool.run_id, entry["kind"]
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
            _send_table(client, run_id, entry["name"], entry["columns"])
        elif kind == "start":
            client.update_run(run_id, status="RUNNING")
        elif kind == "end":
            client.set_terminated(run_id, MLFLOW_STATUS.get(entry["status"], "KILLED"))
    except MlflowException as e:
        if e.error_code not in REFUSALS:
            raise
        spool.refused(entry, str(e))


def _send_table(client: MlflowClient, run_id: str, name: str, columns: dict[str, list[Any]]) -> None:
    rows = "\n".join(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))
    client.log_text(run_id, ",".join(columns) + "\n" + rows + "\n", f"{name}.csv")
    # log_table appends to a table that is there, and a delivery may be repeated.
    if not any(a.path == f"{name}.json" for a in client.list_artifacts(run_id)):
        client.log_table(run_id, columns, f"{name}.json")


class Courier:
    """A thread that delivers a spool as it fills. While the server is away it waits, and training does not notice."""

    def __init__(self, spool: Spool, uri: str, every_seconds: float = 1.0, retry_seconds: float = 5.0) -> None:
        self._spool, self._client = spool, MlflowClient(uri)
        self._every, self._retry = every_seconds, retry_seconds
        self._stop = threading.Event()
        self.last_error = ""
        self._thread = threading.Thread(target=self._run, name="mlflow-courier", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        told_alive = 0.0
        while True:
            closing = self._stop.is_set()
            try:
                deliver(self._spool, self._client)
                if not closing and time.monotonic() - told_alive > ALIVE_SECONDS:
                    self._client.set_tag(self._spool.run_id, ALIVE, alive_now())
                    told_alive = time.monotonic()
                self.last_error = ""
            except Exception as e:  # noqa: BLE001 - databases and object stores behind MLflow raise errors of their own
                self.last_error = one_line(e) or type(e).__name__
            if closing and not self.last_error:
                return
            self._stop.wait(self._retry if self.last_error else self._every) if not closing else time.sleep(self._retry)

    def close(self, timeout_seconds: float) -> str:
        """Delivers what is left. Returns "" when all has arrived, else why not; the spool keeps the rest."""
        self._stop.set()
        self._thread.join(timeout_seconds)
        return (self.last_error or "still delivering") if any(self._spool.pending()) else ""


def set_client_limits() -> None:
    """Makes MLflow's client in this process give up after seconds, not minutes; the Courier waits. And it shows no bars."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
