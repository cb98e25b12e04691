"""Recorder: what a part of the check measures, one JSON object per line, so that nothing is lost if the part is killed.

Written by the parts in a process of their own, read by check.py while they run.
"""

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]


@dataclass
class Recorder:
    """Appends rows, notes and failures to a file. In a row, floats and None are measured; strings and integers are conditions.

    device_name  cpu or cuda
    pace         full: sizes for a GPU; toy: sizes for a machine without one; fast: some of the toy sizes, for a test
    seed         of all random inputs
    seconds      after which the part is killed
    """

    path: Path
    device_name: str
    pace: str
    seed: int
    seconds: float
    began: float = field(default_factory=time.monotonic)

    @cached_property
    def device(self) -> "torch.device":
        """The device of all measurements."""
        import torch  # takes seconds, and a part that fails before needs none

        return torch.device(self.device_name)

    @property
    def toy(self) -> bool:
        """Whether to use toy sizes."""
        return self.pace != "full"

    @property
    def fast(self) -> bool:
        """Whether to use only some of the toy sizes."""
        return self.pace == "fast"

    def row(self, table: str, /, **values: Any) -> None:
        """Adds a row to a table."""
        self._write({"table": table, "row": values})

    def fact(self, name: str, value: Any) -> None:
        """Adds a property of the machine, its software or the measurement."""
        self._write({"fact": name, "value": value})

    def note(self, text: str) -> None:
        """Adds a remark, such as what was left out and why."""
        self._write({"note": text})

    def fail(self, text: str) -> None:
        """Says that a result is wrong. The part goes on and ends as failed."""
        self._write({"failure": text})

    def expect(self, holds: bool, text: str) -> None:
        """Fails with `text` unless `holds`."""
        if not holds:
            self.fail(text)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Turns any error of the block into a failure, so that the part goes on."""
        try:  # a measurement may fail in ways that nobody foresaw, and the next one still counts
            yield
        except Exception as e:  # noqa: BLE001
            traceback.print_exc()
            self.fail(f"{what}: {type(e).__name__}: {' '.join(str(e).split())[:300]}")

    @property
    def seconds_left(self) -> float:
        """Seconds until the part is killed."""
        return self.seconds - (time.monotonic() - self.began)

    def _write(self, item: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(item) + "\n")
