"""Tables of CSV as dictionaries of text, for the tests of tables of records."""

import csv
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a table by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Writes a table with the columns of its first row, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
