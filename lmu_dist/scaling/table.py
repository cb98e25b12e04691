"""Tables that laws are fitted to: columns or anybody's CSV in, checked Rows out. For `fit`, and for `lmu-dist fit`."""

import csv
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmu_dist.config import ConfigError
from lmu_dist.scaling.laws import Floats

MOST_ROWS = 20_000  # a run is a row; a longer table holds steps of curves, which are not independent
LEAST, MOST = 1e-100, 1e100  # beyond, products of them are no numbers any more
SAME_SIZE = 1.05  # sizes and budgets within this ratio are one rung: families meet a size within 2 %
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
    """A table of finished runs: parameters, training tokens, loss in nats; one entry per run."""

    n_params: Floats
    tokens: Floats
    loss: Floats

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, keep: NDArray[np.bool_]) -> "Rows":
        """Some of the rows, by a mask."""
        return Rows(self.n_params[keep], self.tokens[keep], self.loss[keep])

    def copies(self) -> list[str]:
        """For each row the number of the first that is the same: a row pasted twice is one run."""
        first = dict[tuple[float, float, float], str]()
        triples = zip(self.n_params.tolist(), self.tokens.tolist(), self.loss.tolist(), strict=True)
        return [first.setdefault(triple, str(i)) for i, triple in enumerate(triples)]


@dataclass(frozen=True)
class LeftOut:
    """Rows that a fit does not see, by their number in the file (the first below the header is 1), and why."""

    reason: str
    rows: tuple[int, ...]


def rows_of(n_params: ArrayLike, tokens: ArrayLike, loss: ArrayLike) -> Rows:
    """A table from columns. Raises ValueError unless all are positive, finite numbers."""
    rows = Rows(*(np.asarray(v, np.float64) for v in (n_params, tokens, loss)))
    for column in (rows.n_params, rows.tokens, rows.loss):
        if not (np.all(column > 0) and np.all(np.isfinite(column))):
            raise ValueError("sizes, tokens and losses must be positive numbers")
    return rows


def rungs(values: Floats) -> Floats:
    """For each value the least of its rung: a rung starts at the least value that is left and reaches as far as SAME_SIZE."""
    rung, start = np.empty_like(values), 0.0
    for i in np.argsort(values):
        if not start or values[i] > start * SAME_SIZE:
            start = values[i]
        rung[i] = start
    return rung


def read_table(
    path: Path, n_params: str, tokens: str, loss: str, where: Sequence[str] = ()
) -> tuple[Rows, tuple[int, ...], list[LeftOut]]:
    """Rows of a CSV file, their numbers, and those left out. Raises ConfigError for what no fit can be made from.

    `where` are conditions such as `data=c4` or `N>=1e7`: several on one column with `=` mean any of them, otherwise all hold.
    Rows whose loss is missing or not finite (a diverged run) are left out; any other bad number is an error.
    """
    lines, header = _read(path, (n_params, tokens, loss))
    conditions = [_condition(text, header, path) for text in where]
    kept, numbers, excluded, lossless = list[tuple[float, ...]](), list[int](), list[int](), list[int]()
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise ConfigError(f"{path}: row {number} has {len(line)} cells, the header {len(header)}; mend the row")
        cells = dict(zip(header, line, strict=True))
        if not _holds(cells, conditions):
            excluded.append(number)
            continue
        y = _number(cells[loss], path, number, loss, missing_ok=True)
        if not math.isfinite(y):
            lossless.append(number)
            continue
        numbers.append(number)
        kept.append(tuple(_positive(cells[column], path, number, column) for column in (n_params, tokens, loss)))
    if not kept:
        raise ConfigError(f"{path}: none of {len(lines)} rows is left; loosen --where, or look at column {loss!r}")
    if len(kept) > MOST_ROWS:
        raise ConfigError(
            f"{path}: {len(kept):,} rows; a fit takes one row per finished run, at most {MOST_ROWS:,}. Steps of one training "
            "curve are not independent: keep the last of each run, by --where or beforehand"
        )
    said = [("excluded by --where", excluded), (f"{loss} is missing or not finite", lossless)]
    return rows_of(*np.array(kept).T), tuple(numbers), [LeftOut(reason, tuple(rows)) for reason, rows in said if rows]


def _read(path: Path, needed: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    except FileNotFoundError as e:
        raise ConfigError(f"no file {path}") from e
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as e:
        raise ConfigError(f"{path} is no CSV file of text: {e}") from e
    if len(lines) < 2:
        raise ConfigError(f"{path} has no rows below its header" if lines else f"{path} is empty")
    header = [name.strip() for name in lines[0]]
    while header and not header[-1] and all(len(line) < len(header) or not line[len(header) - 1].strip() for line in lines):
        header.pop()  # what spreadsheets leave at the end of each line
        lines = [line[: len(header)] for line in lines]
    if len(set(header)) != len(header):
        raise ConfigError(f"{path}: two columns of one name; rename one")
    for column in needed:
        if column not in header:
            raise ConfigError(f"{path}: no column {column!r}; there are: {', '.join(header)}")
    return lines[1:], header


def _condition(text: str, header: Sequence[str], path: Path) -> tuple[str, str, str]:
    parts = re.match(r"(.*?)(!=|<=|>=|==?|<|>)(.*)", text)
    if not parts:
        raise ConfigError(f"--where {text!r} is no condition; write --where 'column=value', or with != < <= > >=")
    column, sign, value = (part.strip() for part in parts.groups())
    sign = sign.replace("==", "=")
    if column not in header:
        raise ConfigError(f"--where {text!r}: {path} has no column {column!r}; there are: {', '.join(header)}")
    if sign in ("<", "<=", ">", ">=") and _as_number(value) is None:
        raise ConfigError(f"--where {text!r}: {value!r} is no number")
    return column, sign, value


def _holds(cells: dict[str, str], conditions: Sequence[tuple[str, str, str]]) -> bool:
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
        raise ConfigError(f"{path}: row {row}, column {column!r}: {text!r} is no number")
    return value


def _positive(text: str, path: Path, row: int, column: str) -> float:
    value = _number(text, path, row, column)
    if not LEAST < value < MOST:
        asked = "it must be positive and finite, from 1e-100 to 1e100"
        raise ConfigError(f"{path}: row {row}, column {column!r}: {text!r}; {asked}. Mend it, or use --where")
    return value
