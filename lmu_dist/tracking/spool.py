"""What is to be told of one run, in a file: entries in, the same entries out, each once, in order. Knows no MLflow.

Written by launch/recorder, emptied by tracking/delivery.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


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
        if last_steps:  # heard by MLflow, but not from this file: remembered here, or the next start would tell it again
            self._append({"kind": "heard", "steps": dict(last_steps)})
        self._delivered = int(self._delivered_path.read_text()) if self._delivered_path.exists() else 0

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a run in this folder has told anything yet."""
        return (folder / "spool.jsonl").exists()

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
