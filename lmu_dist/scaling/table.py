"""Tables for fitting laws: columns or a CSV file in, checked `Rows` out. Used by the report and by `lmu-dist fit`."""

import csv
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmu_dist.config import ConfigError
from lmu_dist.scaling.laws import Floats

MAX_ROWS = 20_000  # one row per run; a longer table has the steps of training curves, which are not independent
MIN_VALUE, MAX_VALUE = 1e-100, 1e100  # products of values outside this range overflow
SIZE_BIN_RATIO = 1.05  # sizes (and budgets) within this ratio are in one bin; models meet a requested size within 2 %
COMPARISONS = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Rows:
    """A table of finished runs: parameters, training tokens, loss in nats; one entry per run.

    `unique_tokens` has the distinct tokens of each run's data set, and `run` the run of each row, where they are known.
    """

    n_params: Floats
    tokens: Floats
    loss: Floats
    unique_tokens: Floats | None = None
    run: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, keep: NDArray[np.bool_]) -> "Rows":
        """Returns the rows selected by a mask."""
        unique = None if self.unique_tokens is None else self.unique_tokens[keep]
        run = None if self.run is None else tuple(compress(self.run, keep))
        return Rows(self.n_params[keep], self.tokens[keep], self.loss[keep], unique, run)

    def duplicate_groups(self) -> list[str]:
        """Returns, per row, the index of the first row of its group as text. What is in one group counts as one run.

        Equal rows are in one group, and so are rows of one run.
        """
        columns = [self.n_params, self.tokens, self.loss, *([] if self.unique_tokens is None else [self.unique_tokens])]
        first, group = dict[object, int](), list[int]()
        for i, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            keys = [row, *([] if self.run is None else [self.run[i]])]
            earlier = sorted({group[first[key]] for key in keys if key in first})
            group.append(earlier[0] if earlier else i)
            if len(earlier) > 1:  # this row joins two groups
                group = [earlier[0] if g in earlier else g for g in group]
            for key in keys:
                first.setdefault(key, i)
        return [str(i) for i in group]


@dataclass(frozen=True)
class LeftOutRows:
    """Rows that a fit does not use, by their number in the file (1 is the first below the header), and the reason."""

    reason: str
    rows: tuple[int, ...]


def rows_from_columns(
    n_params: ArrayLike,
    tokens: ArrayLike,
    loss: ArrayLike,
    unique_tokens: ArrayLike | None = None,
    run: Sequence[str] | None = None,
) -> Rows:
    """Returns a table made from columns. Raises ValueError unless all values are positive and finite."""
    n, d, y = (np.asarray(v, np.float64) for v in (n_params, tokens, loss))
    unique = None if unique_tokens is None else np.asarray(unique_tokens, np.float64)
    for column in (n, d, y, *([] if unique is None else [unique])):
        if not (np.all(column > 0) and np.all(np.isfinite(column))):
            raise ValueError("sizes, tokens and losses must be positive numbers")
    return Rows(n, d, y, unique, None if run is None else tuple(run))


def size_bins(values: Floats) -> Floats:
    """Returns, for each value, the smallest value of its bin.

    A bin starts at the smallest value that is not yet in a bin and includes all values within SIZE_BIN_RATIO of it.
    """
    bins, start = np.empty_like(values), 0.0
    for i in np.argsort(values):
        if not start or values[i] > start * SIZE_BIN_RATIO:
            start = values[i]
        bins[i] = start
    return bins


def read_table(
    path: Path, n_params: str, tokens: str, loss: str, where: Sequence[str] = ()
) -> tuple[Rows, tuple[int, ...], list[LeftOutRows]]:
    """Reads a CSV file and returns its rows, their numbers, and the rows left out. Raises ConfigError if it cannot be fitted.

    `where` has conditions such as `data=c4` or `N>=1e7`. Several conditions with `=` on one column are joined by "or", all
    others by "and". Rows whose loss is missing or not finite (a diverged run) are left out; any other invalid number is an
    error.
    """
    lines, header = _read_csv(path, (n_params, tokens, loss))
    conditions = [_condition(text, header, path) for text in where]
    kept, numbers, excluded, lossless = list[tuple[float, ...]](), list[int](), list[int](), list[int]()
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise ConfigError(f"{path}: row {number} has {len(line)} cells, the header {len(header)}; correct the row")
        cells = dict(zip(header, line, strict=True))
        if not _matches(cells, conditions):
            excluded.append(number)
            continue
        y = _number(cells[loss], path, number, loss, missing_ok=True)
        if not math.isfinite(y):
            lossless.append(number)
            continue
        numbers.append(number)
        kept.append(tuple(_positive(cells[column], path, number, column) for column in (n_params, tokens, loss)))
    if not kept:
        raise ConfigError(f"{path}: no row of {len(lines)} can be used; relax --where, or check column {loss!r}")
    if len(kept) > MAX_ROWS:
        raise ConfigError(
            f"{path}: {len(kept):,} rows; a fit takes one row per finished run, at most {MAX_ROWS:,}. Steps of one training "
            "curve are not independent: keep only the last step of each run, with --where or before calling this command"
        )
    reasons = [("excluded by --where", excluded), (f"{loss} is missing or not finite", lossless)]
    return (
        rows_from_columns(*np.array(kept).T),
        tuple(numbers),
        [LeftOutRows(reason, tuple(rows)) for reason, rows in reasons if rows],
    )


def _read_csv(path: Path, needed: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    except FileNotFoundError as e:
        raise ConfigError(f"the file {path} does not exist") from e
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as e:
        raise ConfigError(f"{path} is not a CSV text file: {e}") from e
    if len(lines) < 2:
        raise ConfigError(f"{path} has a header but no rows" if lines else f"{path} is empty")
    header = [name.strip() for name in lines[0]]
    while header and not header[-1] and all(len(line) < len(header) or not line[len(header) - 1].strip() for line in lines):
        header.pop()  # an empty last column, as spreadsheets write it
        lines = [line[: len(header)] for line in lines]
    if len(set(header)) != len(header):
        raise ConfigError(f"{path}: two columns have the same name; rename one")
    for column in needed:
        if column not in header:
            raise ConfigError(f"{path} has no column {column!r}; its columns are: {', '.join(header)}")
    return lines[1:], header


def _condition(text: str, header: Sequence[str], path: Path) -> tuple[str, str, str]:
    parts = re.match(r"(.*?)(!=|<=|>=|==?|<|>)(.*)", text)
    if not parts:
        raise ConfigError(f"--where {text!r} is not a condition; write --where 'column=value', or use != < <= > >=")
    column, sign, value = (part.strip() for part in parts.groups())
    sign = sign.replace("==", "=")
    if column not in header:
        raise ConfigError(f"--where {text!r}: {path} has no column {column!r}; its columns are: {', '.join(header)}")
    if sign in ("<", "<=", ">", ">=") and _as_number(value) is None:
        raise ConfigError(f"--where {text!r}: {value!r} is not a number")
    return column, sign, value


def _matches(cells: dict[str, str], conditions: Sequence[tuple[str, str, str]]) -> bool:
    any_of = dict[str, bool]()
    for column, sign, value in conditions:
        have, want = _as_number(cells[column]), _as_number(value)
        if have is not None and want is not None:
            holds = bool(COMPARISONS[sign](have, want))
        else:
            holds = sign in ("=", "!=") and bool(COMPARISONS[sign](cells[column].strip(), value))
        if sign == "=":
            any_of[column] = any_of.get(column, False) or holds
        elif not holds:
            return False
    return all(any_of.values())


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _number(text: str, path: Path, row: int, column: str, missing_ok: bool = False) -> float:
    value = _as_number(text)
    if value is None and missing_ok and text.strip().lower() in ("", "na", "n/a", "null", "none"):
        return math.nan
    if value is None:
        raise ConfigError(f"{path}: row {row}, column {column!r}: {text!r} is not a number")
    return value


def _positive(text: str, path: Path, row: int, column: str) -> float:
    value = _number(text, path, row, column)
    if not MIN_VALUE < value < MAX_VALUE:
        requirement = "it must be positive and finite, from 1e-100 to 1e100"
        raise ConfigError(
            f"{path}: row {row}, column {column!r}: {text!r}; {requirement}. Correct it, or exclude it by --where"
        )
    return value
