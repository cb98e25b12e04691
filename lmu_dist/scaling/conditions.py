"""Conditions on rows of a table, as `--where` has them: texts in, the rows that meet them out. Called by scaling/read_table."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmu_dist.config import ConfigError
from lmu_dist.scaling.numbers import Mark, cell_text, mark_evidence, parse_cell

COMPARISONS = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Condition:
    """A comparison of a column with a value, which is a number where it can be read as one."""

    column: str
    sign: str
    value: str

    @property
    def number(self) -> float | None:
        """The value as a number, None for a text."""
        return parse_cell(self.value).by_mark.get(".")


def parse_condition(text: str) -> Condition:
    """Returns the condition of a text such as `N>=1e7`. Raises ConfigError for anything else."""
    parts = re.match(r"(.*?)(!=|<=|>=|==?|<|>)(.*)", text, re.DOTALL)
    if not parts or not parts[1].strip():
        raise ConfigError(f"--where {text!r} is not a condition; write --where 'column=value', or use != < <= > >=")
    column, sign, value = (part.strip() for part in parts.groups())
    condition = Condition(column, sign.replace("==", "="), value)
    if condition.sign in ("<", "<=", ">", ">=") and condition.number is None:
        raise ConfigError(f"--where {text!r}: {value!r} is not a number")
    return condition


def rows_that_match(
    conditions: Sequence[Condition], column_of: Callable[[str], Sequence[Any]], n_rows: int, decimal: Mark | None
) -> list[bool]:
    """Returns which rows meet the conditions.

    Several conditions with `=` on one column are joined by "or", all others by "and".
    """
    matches, any_of = [True] * n_rows, dict[str, list[bool]]()
    for condition in conditions:
        holds = _holds(condition, column_of(condition.column), decimal)
        if condition.sign == "=":
            any_of[condition.column] = [
                a or b for a, b in zip(any_of.get(condition.column, [False] * n_rows), holds, strict=True)
            ]
        else:
            matches = [a and b for a, b in zip(matches, holds, strict=True)]
    for holds in any_of.values():
        matches = [a and b for a, b in zip(matches, holds, strict=True)]
    return matches


def _holds(condition: Condition, values: Sequence[Any], decimal: Mark | None) -> list[bool]:
    cells = [parse_cell(value) for value in values]
    mark = mark_evidence(cells).decided or decimal or "."
    compare, number = COMPARISONS[condition.sign], condition.number
    holds = list[bool]()
    for value, cell in zip(values, cells, strict=True):
        have = cell.by_mark.get(mark)
        if have is not None and number is not None:
            holds.append(bool(compare(have, number)))
        else:
            want = condition.value.lower() if isinstance(value, bool) else condition.value
            holds.append(condition.sign in ("=", "!=") and bool(compare(cell_text(value), want)))
    return holds
