"""What is to be told of one run, in a file: entries in, the same entries out, each once, in order. Knows no MLflow.

Written by launch/recorder, emptied by tracking/delivery. The file is on the writer's machine, since it grows; where the run's
folder is at a URI, what is new is copied there whenever it must not be lost.
"""

import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from lmu_dist import storage
from lmu_dist.config import Folder

logger = logging.getLogger(__name__)


class Spool:
    """What is to be told of one run, on disk in order, each thing once. Safe for threads.

    A metric is kept for a key and step only the first time: a run that goes on from a checkpoint repeats steps that were
    already told, and must not be heard twice.
    """

    def __init__(self, folder: Folder, run_id: str, last_steps: Mapping[str, int] | None = None) -> None:
        self.run_id = run_id
        here, self._copies = storage.beside(folder), folder / "spool" if storage.is_remote(folder) else None
        self._path, self._delivered_path = here / "spool.jsonl", here / f"spool.delivered.{run_id}"
        self._lock, self._word = threading.Lock(), uuid.uuid4().hex[:8]
        self._last = dict(last_steps or {})
        self.attempts = 0
        storage.make_folder(here)
        self._path.touch()
        self._copied = self._take_copies() if self._copies is not None else 0
        whole = 0
        with open(self._path, "r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn by a kill in the middle of a write
                whole += len(line)
                self._remember(json.loads(line))
            file.truncate(whole)
        if last_steps:  # heard by MLflow, but not from this file: remembered here, or the next start would tell it again
            self._append({"kind": "heard", "steps": dict(last_steps)})
        self._delivered = int(self._delivered_path.read_text()) if self._delivered_path.exists() else 0

    @staticmethod
    def exists(folder: Folder) -> bool:
        """Whether this machine has all that was told of the run in this folder."""
        path = storage.beside(folder) / "spool.jsonl"
        return path.exists() and (not storage.is_remote(folder) or path.read_bytes().startswith(_copied(folder / "spool")))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Metric values of a step, less those already told."""
        # MLflow turns infinity into the largest finite number, which would read as a loss.
        new = {k: float(v) if math.isfinite(v) else math.nan for k, v in values.items() if step > self._last.get(k, -1)}
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

    def start(self) -> None:
        """The run is (again) being worked on."""
        self._append({"kind": "start"})

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

    def copy(self) -> None:
        """Copies what is new to a run's folder at a URI, each time as a file of its own, named by its place in the whole."""
        if self._copies is None:
            return
        with self._lock, open(self._path, "rb") as file:
            file.seek(self._copied)
            if new := file.read():
                # The word keeps a second writer, should there ever be one, from writing over what the first has told.
                (self._copies / f"{self._copied:015d}-{self._word}.jsonl").write_bytes(new)
                self._copied += len(new)
            (self._copies / self._delivered_path.name).write_text(str(self._delivered))

    def _take_copies(self) -> int:
        """Takes over what another machine has told of the run since. Returns how many bytes are in the run's folder."""
        assert self._copies is not None
        copied = _copied(self._copies)
        if not self._path.read_bytes().startswith(copied):
            self._path.write_bytes(copied)
            with suppress(FileNotFoundError):
                self._delivered_path.write_bytes((self._copies / self._delivered_path.name).read_bytes())
        return len(copied)

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock:
            with open(self._path, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
            self._remember(entry)

    def _remember(self, entry: dict[str, Any]) -> None:
        if entry["kind"] == "heard":
            self._last |= entry["steps"]
        if entry["kind"] == "metrics":
            self._last |= dict.fromkeys(entry["values"], entry["step"])
        self.attempts += "lmu.attempt" in entry.get("values", {})


def _copied(copies: Folder) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(copies.glob("*.jsonl"), key=lambda path: path.name))
