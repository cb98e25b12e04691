"""The write-ahead log of one run: params, metrics, tags and tables are appended to a local file before they go to MLflow.

Written by launch/metrics_logger, uploaded by tracking/upload; this module does not import MLflow. The file is on the writer's
machine, since it is appended to. Where the run's folder is at a URI, new entries are copied there at every `copy_to_storage`.

The file has one entry per line, see `log_entries`. A line that was not written to its end is removed before the next append;
a damaged line is skipped and counted.
"""

import json
import logging
import math
import os
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmu_dist import storage
from lmu_dist.config import FailedError, Folder
from lmu_dist.tracking.log_entries import entries

logger = logging.getLogger(__name__)


class MetricsLog:
    """A RunLogger that appends to a file: each entry once. Thread-safe.

    A metric is written for a key and step only the first time. A run that resumes from a checkpoint repeats steps that were
    already logged, and MLflow would show each repeated point twice. Steps may come in any order: if the process of the log is
    killed, Ray repeats the calls that were not answered after later ones.

    If an entry cannot be written, because the disk is full or broken, the method raises FailedError, and so do `flush` and all
    calls of `log_metrics` until the next attempt. So the steps in the log have no gap: an attempt goes on from a checkpoint,
    and `flush` comes before each checkpoint.
    """

    def __init__(self, folder: Folder, run_id: str | None, last_steps: Mapping[str, int] | None = None) -> None:
        """`run_id`: None while MLflow has no run yet, see `assign_run`.

        `last_steps`: the last step of each metric that MLflow has and this file may lack. These steps and those before them
        are not logged again.
        """
        self._local = storage.local_state_dir(folder)
        self._remote_folder = folder / "metrics_log" if storage.is_remote(folder) else None
        self.path = self._local / "metrics_log.jsonl"
        self._lock, self._writer_id = threading.Lock(), uuid.uuid4().hex[:8]
        self._last_steps, self._steps = dict(last_steps or {}), defaultdict[str, set[int]](set)
        self._attempt_ids = set[str]()
        self._failure: FailedError | None = None
        self.attempts, self.n_damaged, self._n_refused = 0, 0, 0
        storage.make_folder(self._local)
        if not self.path.exists():
            self.path.touch()
        self.run_id, self._uploaded = run_id, 0  # in bytes
        self._copied_bytes = self._restore_from_storage() if self._remote_folder is not None else 0
        self._size = 0  # of the whole lines: the rest is what a writer left that died, or whose disk was full
        with open(self.path, "rb") as file:
            for position, entry in entries(file):
                self._size = position
                if entry is None:
                    self.n_damaged += 1
                else:
                    self._update_state(entry)
        if self.n_damaged:
            logger.warning(self._damage())
        if last_steps:  # written down here, or the next process that opens the file would log these steps again
            self._append({"kind": "last_steps", "steps": dict(last_steps)})
        if run_id is not None:
            self.assign_run(run_id)

    def assign_run(self, run_id: str) -> None:
        """Sets the MLflow run that the log is uploaded to. Entries that this run has already are not pending."""
        self.run_id = run_id
        try:
            position = int(self._uploaded_path.read_text())
        except (OSError, ValueError):  # missing or damaged: upload all entries, since an upload may be repeated
            position = 0
        self._uploaded = position if self._is_line_start(position) else 0

    @property
    def known_run_id(self) -> str:
        """The MLflow run that the log is uploaded to, once there is one."""
        assert self.run_id is not None
        return self.run_id

    def notes(self) -> list[str]:
        """Notes for the user: what is not in MLflow although it was logged."""
        refused = f"MLflow refused {self._n_refused} entries of this run; they are in {self._refused_path} with the reasons"
        return [*([self._damage()] if self.n_damaged else []), *([refused] if self._n_refused else [])]

    @staticmethod
    def exists(folder: Folder) -> bool:
        """Whether a log of the run in this folder was started on this machine."""
        return (storage.local_state_dir(folder) / "metrics_log.jsonl").exists()

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

    def start_attempt(self, attempt_id: str, tags: Mapping[str, Any]) -> None:
        """Counts a start of the run's workers in the tag `lmu.attempt`, once per id, and sets further tags.

        The workers go on from a checkpoint, so a failure to write later steps is over.
        """
        attempt = self.attempts + (attempt_id not in self._attempt_ids)  # a call is repeated if its answer was lost
        values = {"lmu.attempt": attempt, **tags}
        self._append({"kind": "tags", "values": {k: str(v) for k, v in values.items()}, "attempt_id": attempt_id})
        self._failure = None

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Logs constants of the run, as text."""
        self._append({"kind": "params", "values": {k: str(v) for k, v in values.items()}})

    def log_metrics(self, step: int, values: Mapping[str, float], time_ms: int | None = None) -> None:
        """Logs metric values of a step. A value already logged for its key and step is dropped.

        `time_ms`: when they were measured, in milliseconds since 1970; None: now.
        """
        self.check()
        # MLflow turns infinity into the largest finite number, which would read as a loss.
        finite = {key: float(value) if math.isfinite(value) else math.nan for key, value in values.items()}
        if new := {key: value for key, value in finite.items() if not self._is_logged(key, step)}:
            time_ms = int(time.time() * 1000) if time_ms is None else time_ms
            self._append({"kind": "metrics", "step": step, "time_ms": time_ms, "values": new})

    def log_curve(self, name: str, values: Sequence[float]) -> None:
        """Logs the values of a metric at the steps 1, 2, and so on."""
        for step, value in enumerate(values, 1):
            self.log_metrics(step, {name: value})

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

    def check(self) -> None:
        """Raises FailedError if an entry of this attempt could not be written."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Waits until all entries are on the disk. Raises FailedError if one of this attempt could not be written."""
        self.check()
        with self._lock:
            try:
                with open(self.path, "r+b") as file:
                    os.fsync(file.fileno())
            except OSError as e:
                raise self._failed(e) from e

    def pending(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The entries that are not uploaded yet, each with the byte position after it. Damaged lines are skipped."""
        with open(self.path, "rb") as file:
            file.seek(self._uploaded)
            for position, entry in entries(file, self._uploaded):
                if entry is not None:
                    yield position, entry

    def mark_uploaded(self, position: int) -> None:
        """Saves that every entry before this byte position is in MLflow."""
        self._uploaded = position  # first: if the file cannot be written, only the next process uploads these entries again
        partial = self._uploaded_path.with_name(self._uploaded_path.name + ".partial")
        partial.write_text(str(position))
        partial.replace(self._uploaded_path)

    def write_refused(self, entry: dict[str, Any], reason: str) -> None:
        """Appends an entry that MLflow refuses to metrics_log.refused.jsonl, with the reason."""
        logger.warning("MLflow refuses a %s entry of run %s: %s", entry["kind"], self.run_id, reason)
        self._refused_path.touch()
        size = self._refused_path.stat().st_size
        _append_line(self._refused_path, json.dumps(entry | {"reason": reason}).encode() + b"\n", size)
        self._n_refused += 1

    def copy_to_storage(self) -> None:
        """Copies new entries to a run's folder at a URI, each time as a new file that is named by its byte position."""
        if self._remote_folder is None:
            return
        with self._lock, open(self.path, "rb") as file:
            file.seek(self._copied_bytes)
            if new := file.read(max(0, self._size - self._copied_bytes)):
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
        if not self.path.read_bytes().startswith(copied):
            storage.write_atomic(self.path, copied)
            with suppress(FileNotFoundError):
                self._uploaded_path.write_bytes((self._remote_folder / self._uploaded_path.name).read_bytes())
        return len(copied)

    @property
    def _uploaded_path(self) -> Path:
        return self._local / f"metrics_log.uploaded.{self.run_id}"

    @property
    def _refused_path(self) -> Path:
        return self._local / "metrics_log.refused.jsonl"

    def _is_line_start(self, position: int) -> bool:
        if position <= 0:
            return position == 0
        with open(self.path, "rb") as file:
            file.seek(position - 1)
            return file.read(1) == b"\n"

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock:
            try:
                _append_line(self.path, line := json.dumps(entry).encode() + b"\n", self._size)
            except OSError as e:
                self._failure = self._failed(e)
                raise self._failure from e
            self._size += len(line)
            self._update_state(entry)

    def _is_logged(self, key: str, step: int) -> bool:
        return step in self._steps[key] or step <= self._last_steps.get(key, -1)

    def _failed(self, error: OSError) -> FailedError:
        return FailedError(storage.error_text(OSError(error.errno, error.strerror, str(self.path))))

    def _damage(self) -> str:
        lines = "line is" if self.n_damaged == 1 else "lines are"
        return f"{self.n_damaged} {lines} damaged in {self.path}; the metrics of such a line are missing in MLflow"

    def _update_state(self, entry: dict[str, Any]) -> None:
        """Updates the steps of each metric and the number of attempts by an entry of the file."""
        if entry["kind"] == "last_steps":
            self._last_steps |= entry["steps"]
        if entry["kind"] == "metrics":
            for key in entry["values"]:
                self._steps[key].add(entry["step"])
        if "lmu.attempt" in entry.get("values", {}) and (attempt_id := entry.get("attempt_id", "")) not in self._attempt_ids:
            self.attempts += 1
            if attempt_id:  # earlier versions wrote none
                self._attempt_ids.add(attempt_id)


def _append_line(path: Path, line: bytes, size: int) -> None:
    """Writes a line at byte position `size`, the end of the whole lines before it. If this fails, nothing of it is left."""
    with open(path, "r+b", buffering=0) as file:
        file.truncate(size)
        file.seek(size)
        rest = memoryview(line)
        try:
            while rest:  # of a write that reaches the end of a disk only the beginning succeeds
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def _copied_entries(remote_folder: Folder) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(remote_folder.glob("*.jsonl"), key=lambda path: path.name))
