"""Reads and writes the cells of CSV tables of records: a file in, rows out whose cells give typed values or one clear error.

These tables are written by lmu-dist itself, so nothing is guessed here; `table_file` reads tables of other programs. For
run_csv and report/tables.
"""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lmu_dist.config import ConfigError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class CsvRow:
    """A row of a table; `number` counts from 1 below the header. Empty cells and missing columns have no value."""

    path: Path
    number: int
    cells: dict[str, str]

    def error(self, column: str, problem: str) -> ConfigError:
        """Returns the error of a cell."""
        return ConfigError(f"{self.path}, row {self.number}, column {column}: {problem}")

    def text(self, column: str) -> str:
        """Returns the text of a cell."""
        return self.cells.get(column, "")

    def value(self, column: str, kind: type) -> Any:
        """Returns a cell as `str`, `int` or `float`; None if it is empty."""
        text = self.text(column)
        if not text or kind is str:
            return text or None
        try:
            number = int(text) if kind is int and text.lstrip("-").isdigit() else float(text)
        except ValueError:
            raise self.error(column, f"{text!r} is not a number") from None
        if kind is int and not (math.isfinite(number) and number == int(number)):
            raise self.error(column, f"{text!r} is not a whole number")
        return kind(number)

    def time_ms(self, column: str) -> int:
        """Returns a time (ISO 8601) as milliseconds since 1970; 0 if the cell is empty."""
        if not (text := self.text(column)):
            return 0
        try:
            return (datetime.fromisoformat(text) - EPOCH) // timedelta(milliseconds=1)
        except (ValueError, TypeError):
            raise self.error(column, f"{text!r} is not a time with its zone, such as {time_text(1)}") from None

    def json(self, column: str, kind: type) -> Any:
        """Returns a cell that holds JSON of a kind, `dict` or `list`; an empty one if the cell is empty."""
        try:
            value = json.loads(self.text(column) or ("{}" if kind is dict else "[]"))
        except ValueError as e:
            raise self.error(column, f"{self.text(column)!r} is not JSON: {e}") from None
        if not isinstance(value, kind):
            raise self.error(column, f"{self.text(column)!r} is not a JSON {'object' if kind is dict else 'array'}")
        return value


def time_text(ms: int) -> str:
    """Formats a time in UTC, ISO 8601 with milliseconds; "" for 0, an unknown time."""
    return (EPOCH + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds") if ms else ""


def read_csv(path: Path, needed: Sequence[str], what: str) -> list[CsvRow]:
    """Reads a table with a header. `what` says in errors what the table is, as in "table of runs".

    Empty lines are skipped. Raises ConfigError if the file cannot be read, lacks a needed column, or has a row of another
    length than its header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, strict=True))
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"{path} is no {what} in CSV: {e}") from e
    header, *body = lines or [[]]
    if missing := [column for column in needed if column not in header]:
        raise ConfigError(f"{path} is no {what}: it has no column {', '.join(missing)}; a report writes such a table")
    if repeated := sorted({column for column in header if header.count(column) > 1}):
        raise ConfigError(f"{path}: column {', '.join(repeated)} is there twice")
    rows = list[CsvRow]()
    for i, line in enumerate((line for line in body if line), 1):
        if len(line) != len(header):
            column = header[len(line)] if len(line) < len(header) else f"{len(header) + 1}"
            problem = "no cell" if len(line) < len(header) else "a cell that the header has no name for"
            raise CsvRow(path, i, {}).error(column, f"{problem}: the row has {len(line)} cells, the header {len(header)}")
        rows.append(CsvRow(path, i, dict(zip(header, line, strict=True))))
    return rows


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes a table. Numbers are written so that they are read back with every bit; missing cells are empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
