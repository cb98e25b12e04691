"""Turns the columns of a table into numbers: cells of N, D and loss in, floats and what is no number out.

Decides the decimal mark of each column and the unit in which it is written. Called by scaling/read_table.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmu_dist.config import ConfigError
from lmu_dist.scaling.numbers import MARKS, Cell, Mark, MarkEvidence, is_state, mark_evidence, parse_cell, unit_scale

MAX_SCALED = 1e6  # a size that is written in millions is smaller than this; larger ones are written in full


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers. `values` has None where a cell is no number, and `cells` says what it is instead.

    `units_row` says that the first cell is a unit such as "M". `note` says how numbers were read that are not plain ones.
    """

    name: str
    option: str  # the command's option that asked for this column, such as --n
    cells: tuple[Cell, ...]
    values: tuple[float | None, ...]
    units_row: bool
    note: str


def number_columns(
    columns: Mapping[str, Sequence[Any]], names: Mapping[str, str], is_used: Sequence[bool], decimal: Mark | None, table: str
) -> dict[str, NumberColumn]:
    """Returns the columns by option (--n, --d, --loss, --unique). Raises ConfigError for a column that has no numbers.

    `names` has the name of each option's column. Only rows with `is_used` count as evidence. `decimal` is the mark that the
    user named.
    """
    cells = {option: [parse_cell(value) for value in values] for option, values in columns.items()}
    used = {option: [c for c, use in zip(column, is_used, strict=True) if use] for option, column in cells.items()}
    marks = _decide_marks({option: mark_evidence(column) for option, column in used.items()}, names, decimal, table)
    units = {
        option: unit_scale(column[0].text) if column and column[0].kind == "word" else None for option, column in cells.items()
    }
    has_units = any(units.values()) and all(units[o] or c[0].kind in ("missing", "word") for o, c in cells.items())
    return {
        option: _number_column(names[option], option, column, marks[option], units[option] if has_units else None, has_units)
        for option, column in cells.items()
    }


def _number_column(name: str, option: str, cells: list[Cell], mark: Mark, unit: float | None, units_row: bool) -> NumberColumn:
    values = [cell.by_mark.get(mark) for cell in cells]
    in_name = re.search(r"[(\[]([^()\[\]]+)[)\]]\s*$", name)
    scale = unit or (unit_scale(in_name[1]) if in_name else None) or 1.0
    if scale > 1 and max((abs(v) for v in values if v is not None), default=0) < MAX_SCALED:
        values = [v if v is None else float(f"{v * scale:.12g}") for v in values]
    else:
        scale = 1.0
    where = "the line below the header" if unit else "its name"
    notes = [f"in units of {scale:,.0f}, as {where} says"] if scale > 1 else []
    unusual = next(((c.text, v) for c, v in zip(cells, values, strict=True) if v is not None and _is_unusual(c, mark)), None)
    if unusual:
        notes.append(f"{unusual[0]!r} is read as {unusual[1]:,.12g}")
    return NumberColumn(
        name, option, tuple(cells), tuple(values), units_row, f"column {name!r}: {'; '.join(notes)}" if notes else ""
    )


def _is_unusual(cell: Cell, mark: Mark) -> bool:
    try:
        return float(cell.text) != cell.by_mark.get(mark)
    except ValueError:
        return True


def _decide_marks(
    evidence: Mapping[str, MarkEvidence], names: Mapping[str, str], decimal: Mark | None, table: str
) -> dict[str, Mark]:
    """Returns the decimal mark of every column. Raises ConfigError if a column contradicts itself, or can be read both ways.

    A column that can be read both ways is read as the others are. A loss such as 4,614 is one with a decimal comma: losses are
    too small for thousands separators.
    """
    decided = dict[str, Mark]()
    for option, e in evidence.items():
        if mark := _mark_of(option, e, names, decimal, table):
            decided[option] = mark
    others = set(decided.values())
    for option, e in evidence.items():
        if option not in decided and e.ambiguous and len(others) != 1:
            values = " or ".join(f"{parse_cell(e.ambiguous).by_mark[mark]:,.12g}" for mark in MARKS)
            raise ConfigError(
                f"{table}: column {names[option]!r} ({option}): {e.ambiguous!r} can be {values}, and no other number decides "
                "which; say it by --decimal . or --decimal ,"
            )
        decided.setdefault(option, next(iter(others)) if e.ambiguous else decimal or ".")
    return decided


def _mark_of(option: str, e: MarkEvidence, names: Mapping[str, str], decimal: Mark | None, table: str) -> Mark | None:
    """Returns the decimal mark that a column shows by itself, or that the user named; None if there is none."""
    if not e.possible:
        raise ConfigError(
            f"{table}: column {names[option]!r} ({option}) has both {e.only['.']!r} and {e.only[',']!r}: one has a decimal "
            "point, the other a decimal comma. Write all numbers the same way"
        )
    if e.decided or not e.ambiguous:
        return e.decided
    return decimal or (("," if "," in e.ambiguous else ".") if option == "--loss" else None)


def check_is_numeric(column: NumberColumn, is_used: Sequence[bool], table: str, numeric: Callable[[], Sequence[str]]) -> None:
    """Raises ConfigError if most cells of the rows in use are words, so that this is the wrong column.

    Names of states, such as diverged, do not count. `numeric` returns the names of columns that have numbers, for the message.
    """
    used = [(i, cell) for i, cell in enumerate(column.cells, 1) if is_used[i - 1] and not (i == 1 and column.units_row)]
    words = [(i, cell.text) for i, cell in used if cell.kind == "word" and not is_state(cell.text)]
    if len(words) > sum(cell.kind == "number" for _, cell in used):
        row, text = words[0]
        share = f"{len(words):,} of {len(used):,} cells"
        hint = f"columns with numbers are: {', '.join(numeric())}" if numeric() else "no column has numbers"
        raise ConfigError(
            f"{table}: row {row}, column {column.name!r}: {text!r} is not a number, as {share} of the column "
            f"({column.option}); {hint}"
        )
