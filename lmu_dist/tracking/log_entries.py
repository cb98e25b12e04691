"""The format of a metrics log, one JSON object per line: lines in, entries out, which upload reads. Called by metrics_log."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

# The kinds of entries, with their fields: a line that lacks one is damaged.
FIELDS: dict[str, dict[str, type]] = {
    "start": {},
    "params": {"values": dict},
    "metrics": {"step": int, "time_ms": int, "values": dict},
    "tags": {"values": dict},
    "dataset": {"name": str, "digest": str, "source": str, "profile": dict},
    "table": {"name": str, "columns": dict},
    "end": {"status": str},
    "last_steps": {"steps": dict},
}


def entries(lines: Iterable[bytes], position: int = 0) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The entry of each whole line, None if it is damaged, with the byte position after the line."""
    for line in lines:
        if not line.endswith(b"\n"):
            return  # the writer was killed, or its disk was full, in the middle of a line
        position += len(line)
        yield position, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        fields = FIELDS[entry["kind"]]
    except (ValueError, KeyError, TypeError):
        return None
    if not all(isinstance(entry.get(name), kind) for name, kind in fields.items()):
        return None
    numbers = entry.get("steps") or (entry["values"] if entry["kind"] == "metrics" else {})
    return entry if all(isinstance(number, int | float) for number in numbers.values()) else None
