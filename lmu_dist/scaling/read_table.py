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
from lmu_dist.scaling.left_out import (
    RowsLeftOut,
    leave_out_all_but_last,
    leave_out_diverged,
    leave_out_incomplete,
    leave_out_lines,
)
from lmu_dist.scaling.number_columns import NumberColumn, check_is_numeric, number_columns
from lmu_dist.scaling.numbers import Mark, cell_text, parse_cell
from lmu_dist.scaling.table import Floats, LeftOutRows, Rows, rows_from_columns
from lmu_dist.scaling.table_file import name_of, read_raw_table
from lmu_dist.scaling.table_text import RawTable

MAX_ROWS = 20_000  # one row per run; a longer table has the steps of training curves, which are not independent
MIN_VALUE, MAX_VALUE = 1e-100, 1e100  # products of values outside this range overflow
SHOWN_COLUMNS, SHOWN_ROWS = 40, 8
FINISHED, UNFINISHED = (
    {"finished", "done", "completed", "success"},
    {"running", "failed", "killed", "crashed", "scheduled", "pending"},
)


@dataclass(frozen=True)
class RunTable:
    """The rows of a file that a fit can use, by their numbers, and those that it cannot, with reasons.

    `columns` has the name of the column by option, such as {"--n": "params"}; `notes` say how unusual cells were read.
    """

    rows: Rows
    numbers: tuple[int, ...]
    left_out: list[LeftOutRows]
    columns: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PointTable:
    """Points (N, D) of a file, for which a loss is asked, by their row numbers; and the rows without numbers."""

    n_params: Floats
    tokens: Floats
    unique_tokens: Floats | None
    numbers: tuple[int, ...]
    left_out: list[LeftOutRows]
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
) -> RunTable:
    """Reads a table of runs: CSV, TSV, JSON, JSON lines, Parquet or Feather, also compressed; `-` is standard input.

    Columns are given by name, or by number from 1. `where` has conditions such as `data=c4` or `N>=1e7`. Several conditions
    with `=` on one column are joined by "or", all others by "and". Rows without a number for N, D or loss are left out. With
    `run`, the last row of each run (most tokens) is used. Raises ConfigError if the table cannot be fitted.
    """
    options = {"--n": n_params, "--d": tokens, "--loss": loss, "--unique": unique_tokens, "--run": run}
    read = _read_columns(path, {option: name for option, name in options.items() if name is not None}, where, decimal)
    kept = read.left_out.kept()
    if len(kept) > MAX_ROWS:
        raise ConfigError(
            f"{name_of(path)}: {len(kept):,} rows; a fit takes one row per finished run, at most {MAX_ROWS:,}. Steps of one "
            "training curve are not independent: name the column that identifies runs by --run, or keep only last steps by "
            "--where"
        )
    labels = [read.labels[i] for i in kept] if read.labels is not None else None
    rows = rows_from_columns(read.kept("--n"), read.kept("--d"), read.kept("--loss"), read.kept_or_none("--unique"), labels)
    return RunTable(rows, tuple(i + 1 for i in kept), read.left_out.by_reason(), read.names, read.notes)


def read_points(
    path: Path, n_params: str, tokens: str, *, unique_tokens: str | None = None, decimal: Mark | None = None
) -> PointTable:
    """Reads a table of models to predict, in any format of `read_table`; it needs no loss. Raises ConfigError as that does."""
    options = {"--n": n_params, "--d": tokens, **({"--unique": unique_tokens} if unique_tokens is not None else {})}
    read = _read_columns(path, options, (), decimal)
    numbers = tuple(i + 1 for i in read.left_out.kept())
    columns = read.kept("--n"), read.kept("--d"), read.kept_or_none("--unique")
    return PointTable(*columns, numbers, read.left_out.by_reason(), read.notes)


@dataclass(frozen=True)
class _Columns:
    """The columns of a file by option; all values in rows that are not left out are positive. `labels` are those of --run."""

    columns: dict[str, NumberColumn]
    labels: list[str] | None
    left_out: RowsLeftOut
    names: dict[str, str]
    notes: tuple[str, ...]

    def kept(self, option: str) -> Floats:
        values = self.columns[option].values
        return np.array([values[i] for i in self.left_out.kept()], np.float64)

    def kept_or_none(self, option: str) -> Floats | None:
        return self.kept(option) if option in self.columns else None


def _read_columns(path: Path, asked: Mapping[str, str], where: Sequence[str], decimal: Mark | None) -> _Columns:
    table = name_of(path)
    raw = read_raw_table(path, [name for name in asked.values() if not name.isdigit()])
    index = {option: _column_index(raw, name, option, table) for option, name in asked.items()}
    names = {option: raw.names[i] or f"column {i + 1}" for option, i in index.items()}
    conditions = [parse_condition(text) for text in where]
    n_rows = len(raw.columns[0]) if raw.columns else 0

    def column_of(name: str) -> Sequence[Any]:
        return raw.columns[_column_index(raw, name, "--where", table)]

    selected = rows_that_match(conditions, column_of, n_rows, decimal)
    left_out = RowsLeftOut(n_rows)
    _check_surplus(raw, tuple(index.values()), table)
    leave_out_lines(raw, [(raw.columns[i], raw.names[i]) for i in index.values()], left_out)
    left_out.add("excluded by --where", [i for i in range(n_rows) if not selected[i]])
    numeric = {option: raw.columns[i] for option, i in index.items() if option != "--run"}
    columns = number_columns(numeric, names, left_out.used, decimal, table)
    for column in columns.values():
        check_is_numeric(column, left_out.used, table, lambda: _numeric_names(raw))
    labels = [cell_text(value) for value in raw.columns[index["--run"]]] if "--run" in index else None
    if labels is not None:
        leave_out_diverged(labels, columns, names["--run"], left_out)
    leave_out_incomplete(columns, left_out)
    if labels is not None:
        leave_out_all_but_last(labels, columns, names["--run"], left_out, table)
    _check_values(columns, left_out, names, table)
    notes = [*raw.notes, *(column.note for column in columns.values() if column.note), *_unfinished(raw, left_out.kept())]
    return _Columns(columns, labels, left_out, names, tuple(notes))


def _column_index(raw: RawTable, name: str, option: str, table: str) -> int:
    """Returns which column has a name, or the number of a column. Raises ConfigError if none or several have."""
    found = [i for i, other in enumerate(raw.names) if other == " ".join(name.split())]
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
        hint = (
            f"did you mean {option} {shlex.quote(similar)}? I{listed[1:]}"
            if similar
            else f"{listed}. Name one of them by {option}"
        )
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


def _check_surplus(raw: RawTable, needed: Sequence[int], table: str) -> None:
    """Raises ConfigError for a row with more cells than the header, unless they are the rest of a text.

    They are in a last column of words that the fit does not need, and in a footnote, whose cells are mostly no numbers.
    """
    for i, cells in sorted((raw.surplus or {}).items()):
        is_text = any(parse_cell(cell).kind == "word" for cell in cells) and max(needed) < len(raw.names) - 1
        is_footnote = 2 * sum(parse_cell(raw.columns[column][i]).kind == "number" for column in needed) < len(needed)
        if not is_text and not is_footnote:
            comma = ' A number with commas needs quotation marks, as in "20,000,000"' if raw.separator == "," else ""
            n_names, n_cells = len(raw.names), len(raw.names) + len(cells)
            raise ConfigError(f"{table}: row {i + 1} has {n_cells} cells, the header {n_names}; correct the row.{comma}")


def _unfinished(raw: RawTable, kept: Sequence[int]) -> list[str]:
    """Returns a note for a column of states, such as MLflow's, by which rows in use have not finished."""
    notes = list[str]()
    for name, values in zip(raw.names, raw.columns, strict=True):
        if name.lower().rpartition(".")[2] not in ("status", "state", "run_status"):
            continue
        rows = [i + 1 for i in kept if cell_text(values[i]).lower() in UNFINISHED]
        done = next((cell_text(values[i]) for i in kept if cell_text(values[i]).lower() in FINISHED), None)
        if rows and done:
            some = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
            state = cell_text(values[rows[0] - 1])
            notes.append(
                f"{len(rows):,} of the rows in use: {name} is {state!r} (row {some}); --where {name}={done} excludes them"
            )
    return notes


def _check_values(columns: Mapping[str, NumberColumn], left_out: RowsLeftOut, names: Mapping[str, str], table: str) -> None:
    """Raises ConfigError if no row is left, or a number is not positive."""
    kept = left_out.kept()
    if not kept:
        reasons = "; ".join(f"{len(out.rows):,}: {out.reason}" for out in left_out.by_reason())
        to_check = ", ".join(repr(name) for name in names.values())
        advice = f"relax --where, or check the columns {to_check}" if "--loss" in names else f"check the columns {to_check}"
        raise ConfigError(f"{table}: no row of {len(left_out.used)} can be used ({reasons}); {advice}")
    for i in kept:
        for column in columns.values():
            value = column.values[i]
            if value is None or not MIN_VALUE < value < MAX_VALUE:
                advice = f", or exclude it by --where '{column.name}>0'" if "--loss" in names else ""
                raise ConfigError(
                    f"{table}: row {i + 1}, column {column.name!r}: {column.cells[i].text!r}; it must be positive and finite, "
                    f"from 1e-100 to 1e100. Correct it{advice}"
                )
