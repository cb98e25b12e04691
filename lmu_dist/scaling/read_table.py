"""Reads a user's table for a fit: a file, the names of its columns and conditions in, checked `Rows` out.

What a row is left out for is said with the numbers of the rows: row 1 is the first below the header; blank lines and comments
do not count. Used by `lmu-dist fit`.
"""

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmu_dist.config import ConfigError
from lmu_dist.scaling.conditions import parse_condition, rows_that_match
from lmu_dist.scaling.number_columns import NumberColumn, check_is_numeric, number_columns
from lmu_dist.scaling.numbers import Mark, cell_text, is_state, parse_cell
from lmu_dist.scaling.table import LeftOutRows, Rows, rows_from_columns
from lmu_dist.scaling.table_file import name_of, read_raw_table
from lmu_dist.scaling.table_text import RawTable

MAX_ROWS = 20_000  # one row per run; a longer table has the steps of training curves, which are not independent
MIN_VALUE, MAX_VALUE = 1e-100, 1e100  # products of values outside this range overflow
SHOWN_COLUMNS, SHOWN_WORDS = 40, 3
SUMMARIES = {
    "total",
    "totals",
    "sum",
    "mean",
    "average",
    "avg",
    "avg.",
    "median",
    "std",
    "stdev",
    "min",
    "max",
    "count",
    "25%",
    "50%",
    "75%",
}


@dataclass(frozen=True)
class Table:
    """The rows of a file that a fit can use, by their numbers, and those that it cannot, with reasons.

    `columns` has the name of the column by option, such as {"--n": "params"}; `notes` say how unusual cells were read.
    """

    rows: Rows
    numbers: tuple[int, ...]
    left_out: list[LeftOutRows]
    columns: dict[str, str]
    notes: tuple[str, ...]


def read_table(
    path: Path,
    n_params: str,
    tokens: str,
    loss: str,
    where: Sequence[str] = (),
    *,
    unique_tokens: str | None = None,
    run: str | None = None,
    decimal: Mark | None = None,
) -> Table:
    """Reads a table of runs: CSV, TSV, JSON, JSON lines, Parquet or Feather, also compressed; `-` is standard input.

    Columns are given by name, or by number from 1. `where` has conditions such as `data=c4` or `N>=1e7`. Several conditions
    with `=` on one column are joined by "or", all others by "and". Rows without a number for N, D or loss are left out. With
    `run`, the last row of each run (most tokens) is used. Raises ConfigError if the table cannot be fitted.
    """
    options = {"--n": n_params, "--d": tokens, "--loss": loss, "--unique": unique_tokens, "--run": run}
    asked, table = {option: name for option, name in options.items() if name is not None}, name_of(path)
    raw = read_raw_table(path, [name for name in asked.values() if not name.isdigit()])
    index = {option: _column_index(raw, name, option, table) for option, name in asked.items()}
    names = {option: raw.names[i] or f"column {i + 1}" for option, i in index.items()}
    conditions = [parse_condition(text) for text in where]
    n_rows = len(raw.columns[0]) if raw.columns else 0

    def column_of(name: str) -> Sequence[Any]:
        return raw.columns[_column_index(raw, name, "--where", table)]

    selected = rows_that_match(conditions, column_of, n_rows, decimal)
    left_out = _RowsLeftOut(n_rows)
    _check_surplus(raw, max(index.values()), table)
    _leave_out_lines(raw, [(raw.columns[i], raw.names[i]) for i in index.values()], left_out)
    left_out.add("excluded by --where", [i for i in range(n_rows) if not selected[i]])
    numeric = {option: i for option, i in index.items() if option != "--run"}
    columns = number_columns({o: raw.columns[i] for o, i in numeric.items()}, names, left_out.used, decimal, table)
    for column in columns.values():
        check_is_numeric(column, left_out.used, table, _numeric_names(raw))
    labels = [cell_text(value) for value in raw.columns[index["--run"]]] if run is not None else None
    if labels is not None:
        _leave_out_diverged(labels, columns, names["--run"], left_out)
    _leave_out_incomplete(columns, left_out)
    if labels is not None:
        _leave_out_all_but_last(labels, columns, names["--run"], left_out, table)
    return _checked_table(columns, labels, left_out, names, raw.notes, table)


class _RowsLeftOut:
    """Which rows (indices from 0) are still used, and for which reasons the others are not: the first reason of each counts."""

    def __init__(self, n_rows: int) -> None:
        self.used, self._reasons = [True] * n_rows, dict[str, list[int]]()

    def add(self, reason: str, rows: Sequence[int]) -> None:
        for row in rows:
            if self.used[row]:
                self.used[row] = False
                self._reasons.setdefault(reason, []).append(row + 1)

    def kept(self) -> list[int]:
        return [row for row, used in enumerate(self.used) if used]

    def by_reason(self) -> list[LeftOutRows]:
        return [LeftOutRows(reason, tuple(sorted(rows))) for reason, rows in self._reasons.items()]


def _column_index(raw: RawTable, name: str, option: str, table: str) -> int:
    """Returns which column has a name, or the number of a column. Raises ConfigError if none or several have."""
    found = [i for i, other in enumerate(raw.names) if other == name.strip()]
    if not found and name.isdigit() and 1 <= int(name) <= len(raw.names):
        return int(name) - 1
    if len(found) > 1:
        numbers = [str(i + 1) for i in found]
        how = f"rename one, or give its number: {option} {' or '.join(numbers)}" if option != "--where" else "rename one"
        raise ConfigError(f"{table}: {'two' if len(found) == 2 else len(found)} columns have the same name {name!r}; {how}")
    if not found:
        shown = [other for other in raw.names if other]
        more = f" and {len(shown) - SHOWN_COLUMNS:,} more" if len(shown) > SHOWN_COLUMNS else ""
        listed = f"its columns are: {', '.join(shown[:SHOWN_COLUMNS])}{more}"
        similar = _similar(name, shown)
        hint = f"did you mean {option} {shlex.quote(similar)}? I{listed[1:]}" if similar else listed
        raise ConfigError(f"{table} has no column {name!r}; {hint}")
    return found[0]


def _similar(name: str, names: Sequence[str]) -> str | None:
    """Returns the name that the user may have meant: the same in other letters, with a prefix such as metrics., or alike."""
    wanted, lower = name.strip().lower(), {other.lower(): other for other in names}
    same = [other for key, other in lower.items() if key == wanted or key.endswith((f".{wanted}", f"/{wanted}", f"_{wanted}"))]
    close = difflib.get_close_matches(wanted, lower, 1)
    return same[0] if same else lower[close[0]] if close else None


def _numeric_names(raw: RawTable) -> list[str]:
    """Returns the names of columns that mostly have numbers."""
    found = list[str]()
    for name, values in zip(raw.names, raw.columns, strict=True):
        kinds = [parse_cell(value).kind for value in values[:200]]
        if kinds.count("number") > kinds.count("word"):
            found.append(name)
    return found[:SHOWN_COLUMNS]


def _check_surplus(raw: RawTable, last_needed: int, table: str) -> None:
    """Raises ConfigError for a row with more cells than the header, unless they are the rest of a text in the last column."""
    for i, cells in sorted((raw.surplus or {}).items()):
        is_text = any(parse_cell(cell).kind == "word" for cell in cells)
        if not is_text or last_needed >= len(raw.names) - 1:
            comma = ' A number with commas needs quotation marks, as in "20,000,000"' if raw.separator == "," else ""
            n_names, n_cells = len(raw.names), len(raw.names) + len(cells)
            raise ConfigError(f"{table}: row {i + 1} has {n_cells} cells, the header {n_names}; correct the row.{comma}")


def _leave_out_lines(raw: RawTable, needed: Sequence[tuple[Sequence[Any], str]], left_out: _RowsLeftOut) -> None:
    """Leaves out rows that are no runs: a header that is repeated, and totals or means below the table."""
    n_rows = len(left_out.used)
    left_out.add("repeats the header", [i for i in range(n_rows) if all(values[i] == name for values, name in needed)])
    for i in reversed(range(n_rows)):
        if not any(isinstance(c[i], str) and c[i].strip().strip(":").lower() in SUMMARIES for c in raw.columns):
            break
        left_out.add("a total or mean below the table", [i])


def _leave_out_incomplete(columns: Mapping[str, NumberColumn], left_out: _RowsLeftOut) -> None:
    """Leaves out the rows in which a cell is no number: missing, a word such as diverged, or for a loss not finite."""
    if next(iter(columns.values())).units_row:
        left_out.add("has units", [0])
    for option, column in sorted(columns.items(), key=lambda item: item[0] != "--loss"):
        kinds = [cell.kind for cell in column.cells]
        if option == "--loss":
            no_loss = [i for i, kind in enumerate(kinds) if kind in ("missing", "not finite")]
            left_out.add(f"{column.name} is missing or not finite", no_loss)
        else:
            empty = [i for i, cell in enumerate(column.cells) if cell.kind == "missing" or "nan" in cell.text.lower()]
            left_out.add(f"{column.name} is missing", [i for i in empty if kinds[i] != "number"])
        words = [i for i, kind in enumerate(kinds) if kind == "word" and left_out.used[i]]
        shown = list(dict.fromkeys(column.cells[i].text for i in words))
        more = ", ..." if len(shown) > SHOWN_WORDS else ""
        left_out.add(f"{column.name} is not a number ({', '.join(map(repr, shown[:SHOWN_WORDS]))}{more})", words)


def _leave_out_diverged(labels: Sequence[str], columns: Mapping[str, NumberColumn], name: str, left_out: _RowsLeftOut) -> None:
    """Leaves out the runs whose loss at their largest number of tokens is not finite, or a state: they diverged."""
    loss, tokens = columns["--loss"], columns["--d"]
    ended = dict[str, tuple[float, bool]]()
    for i, label in enumerate(labels):
        cell, d = loss.cells[i], tokens.values[i]
        failed = cell.kind == "not finite" or (cell.kind == "word" and is_state(cell.text))
        if left_out.used[i] and d is not None and (failed or cell.kind == "number"):
            ended[label] = max(ended.get(label, (-np.inf, False)), (d, failed))
    diverged = [i for i, label in enumerate(labels) if ended.get(label, (0, False))[1]]
    finite = [i for i in diverged if loss.cells[i].kind == "number"]
    left_out.add(f"the run ({name}) has no finite loss at its end", finite)


def _leave_out_all_but_last(
    labels: Sequence[str], columns: Mapping[str, NumberColumn], name: str, left_out: _RowsLeftOut, table: str
) -> None:
    """Leaves out all rows of a run but the one with most tokens, the later one of two. Rows without a name are left out."""
    left_out.add(f"{name} is missing", [i for i, label in enumerate(labels) if not label])
    last, size = dict[str, int](), dict[str, int]()
    for i in left_out.kept():
        label, first = labels[i], size.setdefault(labels[i], i)
        n = columns["--n"]
        if n.values[first] != n.values[i]:
            raise ConfigError(
                f"{table}: run {label!r} has two sizes: {n.cells[first].text} in row {first + 1} and {n.cells[i].text} in row "
                f"{i + 1}, column {n.name!r}; name by --run a column that differs between runs"
            )
        if label not in last or (columns["--d"].values[i] or 0) >= (columns["--d"].values[last[label]] or 0):
            last[label] = i
    left_out.add(f"not the last row of its run ({name})", [i for i in left_out.kept() if last[labels[i]] != i])


def _checked_table(
    columns: Mapping[str, NumberColumn],
    labels: Sequence[str] | None,
    left_out: _RowsLeftOut,
    names: dict[str, str],
    notes: Sequence[str],
    table: str,
) -> Table:
    kept = left_out.kept()
    if not kept:
        reasons = "; ".join(f"{len(out.rows):,}: {out.reason}" for out in left_out.by_reason())
        raise ConfigError(
            f"{table}: no row of {len(left_out.used)} can be used ({reasons}); relax --where, or check column "
            f"{names['--loss']!r}"
        )
    if len(kept) > MAX_ROWS:
        raise ConfigError(
            f"{table}: {len(kept):,} rows; a fit takes one row per finished run, at most {MAX_ROWS:,}. Steps of one training "
            "curve are not independent: name the column that identifies runs by --run, or keep only last steps by --where"
        )
    for i in kept:
        for column in columns.values():
            value = column.values[i]
            if value is None or not MIN_VALUE < value < MAX_VALUE:
                raise ConfigError(
                    f"{table}: row {i + 1}, column {column.name!r}: {column.cells[i].text!r}; it must be positive and finite, "
                    f"from 1e-100 to 1e100. Correct it, or exclude it by --where '{column.name}>0'"
                )
    numbers = {option: [column.values[i] for i in kept] for option, column in columns.items()}
    rows = rows_from_columns(
        np.array(numbers["--n"], np.float64),
        np.array(numbers["--d"], np.float64),
        np.array(numbers["--loss"], np.float64),
        np.array(numbers["--unique"], np.float64) if "--unique" in numbers else None,
        [labels[i] for i in kept] if labels is not None else None,
    )
    all_notes = (*notes, *(column.note for column in columns.values() if column.note))
    return Table(rows, tuple(i + 1 for i in kept), left_out.by_reason(), names, all_notes)
