"""The only room that knows MLflow: experiments, runs, params, metrics and tags out; tables of RunRecords back in.

A study is a parent run, a cell a child run tagged with its key. All that is told of a run once it exists goes through
a Spool, a file that is appended to at once and delivered when the server listens; delivering it twice changes nothing.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lmu_dist.config import ConfigError
from lmu_dist.records import COMPLETE, DIVERGED, FAILED, RUNNING, RunRecord

PARENT, RUN_NAME, KEY, STATUS, STUDY = "mlflow.parentRunId", "mlflow.runName", "lmu.key", "lmu.status", "lmu.study"
MLFLOW_STATUS = {COMPLETE: "FINISHED", FAILED: "FAILED", DIVERGED: "FAILED"}  # anything else: KILLED
# An answer with one of these will not change however often it is asked for; anything else is the network's fault.
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
MAX_METRICS, MAX_PARAMS = 1000, 100  # of one log_batch

logger = logging.getLogger(__name__)
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def default_uri(folder: Path) -> str:
    """Where runs are recorded unless MLFLOW_TRACKING_URI says otherwise: an SQLite file in `folder`."""
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"


class Store:
    """An MLflow tracking store, by URI. Methods raise ConfigError when it does not answer."""

    def __init__(self, uri: str) -> None:
        if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
            # Ray's workers live in other folders; a relative path would mean another file there.
            uri = default_uri(Path(uri.removeprefix("sqlite:///")).parent).replace(
                "mlflow.db", Path(uri.removeprefix("sqlite:///")).name
            )
        self.uri = uri
        self.client = MlflowClient(uri)

    def open_study(self, experiment: str, study: str) -> tuple[str, str]:
        """(experiment id, run id) of a study, made if new."""
        with self._answering():
            found = self.client.get_experiment_by_name(experiment)
            if found is not None and found.lifecycle_stage != "active":
                raise ConfigError(f"experiment {experiment!r} was deleted in MLflow; restore it there or choose another name")
            experiment_id = (
                found.experiment_id if found else self.client.create_experiment(experiment, self._artifacts(experiment))
            )
            runs = self.client.search_runs([experiment_id], f"tags.`{STUDY}` = '{study}'", max_results=1)
            run = runs[0] if runs else self.client.create_run(experiment_id, tags={STUDY: study, RUN_NAME: study})
            return experiment_id, run.info.run_id

    def find_run(self, key: str) -> Run | None:
        """The run of a cell, in whatever experiment it was first asked for."""
        with self._answering():
            experiments = [e.experiment_id for e in self.client.search_experiments(ViewType.ACTIVE_ONLY)]
            runs = self.client.search_runs(experiments, f"tags.`{KEY}` = '{key}'", max_results=1) if experiments else []
            return runs[0] if runs else None

    def create_run(self, experiment_id: str, study_id: str, name: str, key: str) -> str:
        """A new child run of a study, tagged with its key."""
        with self._answering():
            tags = {PARENT: study_id, RUN_NAME: name, KEY: key, STATUS: RUNNING}
            return self.client.create_run(experiment_id, tags=tags).info.run_id

    def folder_of(self, run_id: str) -> Path:
        """The folder with a run's checkpoints."""
        try:
            folder = self.client.get_run(run_id).data.tags.get("lmu.folder")
        except MlflowException as e:
            raise ConfigError(f"no run {run_id!r} in {self.uri}, nor a folder of that name: {_one_line(e)}") from e
        if not folder or not Path(folder).is_dir():
            raise ConfigError(f"run {run_id} has no folder on this machine (recorded: {folder}); give the path of its folder")
        return Path(folder)

    def records(self, experiment: str) -> dict[str, RunRecord]:
        """All complete RunRecords of an experiment by run id."""
        with self._answering():
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                raise ConfigError(f"no experiment {experiment!r} in {self.uri}; see the names in the MLflow UI")
            records, token = {}, None
            while True:
                page = self.client.search_runs([found.experiment_id], f"tags.`{KEY}` LIKE '%'", page_token=token)
                for run in page:
                    if (record := record_of(run)) is not None:
                        records[run.info.run_id] = record
                if not (token := page.token):
                    return records

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The last step each metric of a run has, for a spool that lost its file."""
        with self._answering():
            metrics = self.client.get_run(run_id).data.metrics
            return {k: max(m.step for m in self.client.get_metric_history(run_id, k)) for k in metrics}

    def _artifacts(self, experiment: str) -> str | None:
        """A folder beside the SQLite file; a server decides for itself."""
        if not self.uri.startswith("sqlite:////"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts" / experiment).as_uri()

    def _answering(self) -> "_Answering":
        return _Answering(self.uri)


@dataclass
class _Answering:
    """Turns MLflow's errors into one line that names the store."""

    uri: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, MlflowException):
            raise ConfigError(
                f"MLflow at {self.uri} does not answer, or refuses; start it, or set MLFLOW_TRACKING_URI: {_one_line(error)}"
            ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def record_of(run: Run) -> RunRecord | None:
    """The RunRecord of a run that ended; None for one that has not."""
    try:
        return RunRecord.from_columns(run.data.params, run.data.metrics, run.data.tags)
    except (KeyError, ValueError):
        return None


class Spool:
    """What is to be told of one run, on disk in order, each thing once. Safe for threads.

    A metric is kept for a key and step only the first time: a run that goes on from a checkpoint repeats steps that were
    already told, and must not be heard twice.
    """

    def __init__(self, folder: Path, run_id: str, last_steps: Mapping[str, int] | None = None) -> None:
        self.run_id = run_id
        self._path, self._delivered_path = folder / "spool.jsonl", folder / f"spool.delivered.{run_id}"
        self._lock = threading.Lock()
        self._last = dict(last_steps or {})
        self.attempts = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        whole = 0
        with open(self._path, "r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn by a kill in the middle of a write
                whole += len(line)
                self._remember(json.loads(line))
            file.truncate(whole)
        self._delivered = int(self._delivered_path.read_text()) if self._delivered_path.exists() else 0

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a run in this folder has told anything yet."""
        return (folder / "spool.jsonl").exists()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Metric values of a step, less those already told."""
        new = {k: float(v) for k, v in values.items() if step > self._last.get(k, -1)}
        if new:
            self._append({"kind": "metrics", "step": step, "time_ms": int(time.time() * 1000), "values": new})

    def params(self, values: Mapping[str, Any]) -> None:
        """Constants of the run."""
        self._append({"kind": "params", "values": {k: str(v) for k, v in values.items()}})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Facts that may change; the last one told holds."""
        self._append({"kind": "tags", "values": {k: str(v) for k, v in values.items()}})

    def attempt(self, tags: Mapping[str, Any]) -> None:
        """A new start of the run's workers."""
        self.tags({"lmu.attempt": self.attempts + 1, **tags})

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """The data the run trains on."""
        self._append({"kind": "dataset", "name": name, "digest": digest, "source": source, "profile": dict(profile)})

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """A table as artifact, both as MLflow's (name.json) and as name.csv."""
        self._append({"kind": "table", "name": name, "columns": dict(columns)})

    def end(self, status: str) -> None:
        """The run is over."""
        self._append({"kind": "end", "status": status})

    def pending(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """What is not delivered yet, each with the position after it."""
        position = self._delivered
        with open(self._path, "rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                position += len(line)
                yield position, json.loads(line)

    def delivered(self, position: int) -> None:
        """Remembers that all before `position` has arrived."""
        self._delivered = position
        partial = self._delivered_path.with_name(self._delivered_path.name + ".partial")
        partial.write_text(str(position))
        partial.replace(self._delivered_path)

    def refused(self, entry: dict[str, Any], reason: str) -> None:
        """Keeps what MLflow will never take, beside the spool."""
        logger.warning("MLflow refuses a %s entry of run %s: %s", entry["kind"], self.run_id, reason)
        with open(self._path.with_name("spool.refused.jsonl"), "a") as file:
            file.write(json.dumps(entry | {"reason": reason}) + "\n")

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock:
            with open(self._path, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
            self._remember(entry)

    def _remember(self, entry: dict[str, Any]) -> None:
        if entry["kind"] == "metrics":
            self._last |= dict.fromkeys(entry["values"], entry["step"])
        self.attempts += "lmu.attempt" in entry.get("values", {})


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
        for m in batch:
            spool.refused({"kind": "metrics", "step": m.step, "values": {m.key: m.value}}, str(e))
    spool.delivered(reached)


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
        else:
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
        while True:
            closing = self._stop.is_set()
            try:
                deliver(self._spool, self._client)
                self.last_error = ""
            except (MlflowException, OSError) as e:
                self.last_error = _one_line(e)
            if closing and not self.last_error:
                return
            self._stop.wait(self._retry if self.last_error else self._every) if not closing else time.sleep(self._retry)

    def close(self, timeout_seconds: float) -> str:
        """Delivers what is left. Returns "" when all has arrived, else why not; the spool keeps the rest."""
        self._stop.set()
        self._thread.join(timeout_seconds)
        return (self.last_error or "still delivering") if self._thread.is_alive() else ""


def limit_retries() -> None:
    """Makes MLflow's client give up after seconds, not minutes, in this process; the Courier does the waiting."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
