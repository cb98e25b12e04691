"""The write-ahead log of one run: params, metrics, tags and tables are appended to a local file before they go to MLflow.

Written by launch/metrics_logger, uploaded by tracking/upload; this module does not import MLflow. The file is on the writer's
machine, since it is appended to. Where the run's folder is at a URI, new entries are copied there at every `copy_to_storage`.
"""

import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from lmu_dist import storage
from lmu_dist.config import Folder

logger = logging.getLogger(__name__)


@runtime_checkable
class RunLogger(Protocol):
    """Logs one run. Implemented by MetricsLog, which writes a file, and by RemoteRunLogger, which calls the actor that does."""

    def start_run(self) -> None:
        """Sets the status of the MLflow run to RUNNING."""

    def start_attempt(self, tags: Mapping[str, Any]) -> None:
        """Counts a start of the run's workers in the tag `lmu.attempt`, and sets further tags."""

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Logs constants of the run."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metric values of a step. A value already logged for its key at this or a later step is dropped."""

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags. The last value of a tag replaces the ones before."""

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Logs the dataset the run trains on."""

    def log_table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Logs a table as two artifacts: name.json, in MLflow's format, and name.csv."""

    def end_run(self, status: str) -> None:
        """Ends the MLflow run with a status of `lmu_dist.records`."""


class MetricsLog:
    """A RunLogger that appends to a file: entries in order, each once. Thread-safe.

    A metric is written for a key and step only the first time. A run that resumes from a checkpoint repeats steps that were
    already logged, and MLflow would show each repeated point twice.
    """

    def __init__(self, folder: Folder, run_id: str, last_steps: Mapping[str, int] | None = None) -> None:
        """`last_steps`: the last step of each metric that MLflow has and this file may lack."""
        self.run_id = run_id
        local = storage.local_state_dir(folder)
        self._remote_folder = folder / "metrics_log" if storage.is_remote(folder) else None
        self._path, self._uploaded_path = local / "metrics_log.jsonl", local / f"metrics_log.uploaded.{run_id}"
        self._lock, self._writer_id = threading.Lock(), uuid.uuid4().hex[:8]
        self._last_steps = dict(last_steps or {})
        self.attempts = 0
        storage.make_folder(local)
        self._path.touch()
        self._copied_bytes = self._restore_from_storage() if self._remote_folder is not None else 0
        intact_bytes = 0
        with open(self._path, "r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the writer was killed in the middle of a line
                intact_bytes += len(line)
                self._update_state(json.loads(line))
            file.truncate(intact_bytes)
        if last_steps:  # written down here, or the next process that opens the file would log these steps again
            self._append({"kind": "last_steps", "steps": dict(last_steps)})
        self._uploaded = int(self._uploaded_path.read_text()) if self._uploaded_path.exists() else 0

    @staticmethod
    def is_complete(folder: Folder) -> bool:
        """Whether this machine has every entry that was logged for the run in this folder."""
        path = storage.local_state_dir(folder) / "metrics_log.jsonl"
        return path.exists() and (
            not storage.is_remote(folder) or path.read_bytes().startswith(_copied_entries(folder / "metrics_log"))
        )

    def start_run(self) -> None:
        """Sets the status of the MLflow run to RUNNING."""
        self._append({"kind": "start"})

    def start_attempt(self, tags: Mapping[str, Any]) -> None:
        """Counts a start of the run's workers in the tag `lmu.attempt`, and sets further tags."""
        self.set_tags({"lmu.attempt": self.attempts + 1, **tags})

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Logs constants of the run, as text."""
        self._append({"kind": "params", "values": {k: str(v) for k, v in values.items()}})

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metric values of a step. A value already logged for its key at this or a later step is dropped."""
        # MLflow turns infinity into the largest finite number, which would read as a loss.
        new = {k: float(v) if math.isfinite(v) else math.nan for k, v in values.items() if step > self._last_steps.get(k, -1)}
        if new:
            self._append({"kind": "metrics", "step": step, "time_ms": int(time.time() * 1000), "values": new})

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags, as text. The last value of a tag replaces the ones before."""
        self._append({"kind": "tags", "values": {k: str(v) for k, v in values.items()}})

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Logs the dataset the run trains on."""
        self._append({"kind": "dataset", "name": name, "digest": digest, "source": source, "profile": dict(profile)})

    def log_table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Logs a table as two artifacts: name.json, in MLflow's format, and name.csv."""
        self._append({"kind": "table", "name": name, "columns": dict(columns)})

    def end_run(self, status: str) -> None:
        """Ends the MLflow run with a status of `lmu_dist.records`."""
        self._append({"kind": "end", "status": status})

    def pending(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The entries that are not uploaded yet, each with the byte position after it."""
        position = self._uploaded
        with open(self._path, "rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                position += len(line)
                yield position, json.loads(line)

    def mark_uploaded(self, position: int) -> None:
        """Saves that every entry before this byte position is in MLflow."""
        self._uploaded = position
        partial = self._uploaded_path.with_name(self._uploaded_path.name + ".partial")
        partial.write_text(str(position))
        partial.replace(self._uploaded_path)

    def write_refused(self, entry: dict[str, Any], reason: str) -> None:
        """Appends an entry that MLflow refuses to metrics_log.refused.jsonl, with the reason."""
        logger.warning("MLflow refuses a %s entry of run %s: %s", entry["kind"], self.run_id, reason)
        with open(self._path.with_name("metrics_log.refused.jsonl"), "a") as file:
            file.write(json.dumps(entry | {"reason": reason}) + "\n")

    def copy_to_storage(self) -> None:
        """Copies new entries to a run's folder at a URI, each time as a new file that is named by its byte position."""
        if self._remote_folder is None:
            return
        with self._lock, open(self._path, "rb") as file:
            file.seek(self._copied_bytes)
            if new := file.read():
                # The writer's id keeps a second writer, should there ever be one, from overwriting what the first has written.
                (self._remote_folder / f"{self._copied_bytes:015d}-{self._writer_id}.jsonl").write_bytes(new)
                self._copied_bytes += len(new)
            (self._remote_folder / self._uploaded_path.name).write_text(str(self._uploaded))

    def _restore_from_storage(self) -> int:
        """Replaces the local file by the copies in the run's folder if another machine has logged the run since.

        Returns how many bytes the copies have.
        """
        assert self._remote_folder is not None
        copied = _copied_entries(self._remote_folder)
        if not self._path.read_bytes().startswith(copied):
            self._path.write_bytes(copied)
            with suppress(FileNotFoundError):
                self._uploaded_path.write_bytes((self._remote_folder / self._uploaded_path.name).read_bytes())
        return len(copied)

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock:
            with open(self._path, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
            self._update_state(entry)

    def _update_state(self, entry: dict[str, Any]) -> None:
        """Updates the last step of each metric and the number of attempts by an entry of the file."""
        if entry["kind"] == "last_steps":
            self._last_steps |= entry["steps"]
        if entry["kind"] == "metrics":
            self._last_steps |= dict.fromkeys(entry["values"], entry["step"])
        self.attempts += "lmu.attempt" in entry.get("values", {})


def _copied_entries(remote_folder: Folder) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(remote_folder.glob("*.jsonl"), key=lambda path: path.name))
