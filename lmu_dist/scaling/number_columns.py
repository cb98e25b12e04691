"""Turns the columns of a table into numbers: cells of N, D and loss in, floats and what is no number out.

Decides the decimal mark of each column and the unit in which it is written. Called by scaling/read_table.
"""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmu_dist.config import ConfigError
from lmu_dist.scaling.numbers import MARKS, Cell, Mark, MarkEvidence, is_state, mark_evidence, parse_cell, unit_scale

MAX_SCALED = 1e6  # a number that is written in the unit of its column is smaller; a larger one may be written in full
MOST = {"--n": 1e12, "--d": 1e14}  # more parameters or tokens than a run has
USUAL_RATIO = 100.0  # tokens per parameter; of two readings of a column the one that is nearer to it is taken, which is a guess
# Why a column's numbers are taken as written, although its name has a unit.
PLAUSIBLE = {
    "--n": "D/N is more plausible so",
    "--d": "D/N is more plausible so",
    "--unique": "they are nearer to the tokens so",
}
RENAME = "if that is wrong, rename the column"


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
    below = {option: units[option] if has_units else None for option in cells}
    written = {option: _scale(names[option], below[option]) for option in cells}
    values = {option: [cell.by_mark.get(marks[option]) for cell in column] for option, column in cells.items()}
    suffixed = {option for option, column in cells.items() if any(_has_suffix(cell) for cell in column)}
    scales = _scales_that_apply(written, values, suffixed)
    found = dict[str, NumberColumn]()
    for option, column in cells.items():
        where = "the line below the header" if below[option] else "its name"
        note = ""
        if scales[option] > 1:
            note = f"in units of {scales[option]:,.0f}, as {where} says" + ("" if below[option] else f"; {RENAME}")
        elif written[option] > 1:
            why = "numbers have suffixes" if option in suffixed else PLAUSIBLE.get(option, "they are large")
            note = f"as written, not in units of {written[option]:,.0f} as {where} says, because {why}; {RENAME}"
        found[option] = _number_column(names[option], option, column, marks[option], scales[option], has_units, note)
    return found


def _scale(name: str, unit: float | None) -> float:
    """Returns by what a column's numbers are to be multiplied, as the line below the header or the column's name says."""
    in_name = re.search(r"[(\[]([^()\[\]]+)[)\]]\s*$", name)
    return unit or (unit_scale(in_name[1]) if in_name else None) or 1.0


def _scales_that_apply(
    written: Mapping[str, float], values: Mapping[str, Sequence[float | None]], suffixed: Collection[str]
) -> dict[str, float]:
    """Returns the scale of every column, which is 1 if its numbers are written in full although it names a unit.

    Numbers below MAX_SCALED are in the unit. Larger ones are, unless no run has as many parameters or tokens, or D/N of the
    medians is nearer to the usual without the unit. Columns whose numbers have suffixes, as 18.9M has, are not in the unit.
    """
    median = {option: _median(column) for option, column in values.items()}
    most = {option: max((abs(v) for v in column if v is not None), default=0.0) for option, column in values.items()}
    choices = dict[str, tuple[float, ...]]()
    for option, scale in written.items():
        if most[option] < MAX_SCALED and option not in suffixed:
            choices[option] = (scale,)
        else:
            choices[option] = (1.0,) if option in suffixed or option == "--loss" else (scale, 1.0)
    n, d = "--n", "--d"
    if n not in choices or d not in choices:
        return {option: choice[0] for option, choice in choices.items()}

    def distance(pair: tuple[float, float]) -> tuple[bool, float]:
        too_large = pair[0] * most[n] > MOST[n] or pair[1] * most[d] > MOST[d]
        return too_large, abs(math.log(max(pair[1] * median[d], 1e-300) / max(pair[0] * median[n], 1e-300) / USUAL_RATIO))

    best = min(itertools.product(choices[n], choices[d]), key=distance)  # of equals the first: in the units
    scales = {option: choice[0] for option, choice in choices.items()} | {n: best[0], d: best[1]}
    if len(choices.get("--unique", ())) > 1:  # about as many as the tokens of a run
        unique, tokens = median["--unique"], scales[d] * median[d]
        scales["--unique"] = min(
            choices["--unique"], key=lambda s: abs(math.log(max(s * unique, 1e-300) / max(tokens, 1e-300)))
        )
    return scales


def _has_suffix(cell: Cell) -> bool:
    found = re.search(r"[^\W\d_]+$", cell.text) if cell.kind == "number" else None
    return found is not None and (unit_scale(found[0]) or 1.0) > 1


def _median(values: Sequence[float | None]) -> float:
    return statistics.median([abs(v) for v in values if v is not None] or [1.0])


def _number_column(
    name: str, option: str, cells: list[Cell], mark: Mark, scale: float, units_row: bool, note: str
) -> NumberColumn:
    values = [cell.by_mark.get(mark) for cell in cells]
    if scale > 1:
        values = [v if v is None else float(f"{v * scale:.12g}") for v in values]
    notes = [note] if note else []
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
