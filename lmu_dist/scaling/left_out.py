"""Decides which rows of a user's table a fit cannot use, and says why. Called by scaling/read_table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmu_dist.config import ConfigError
from lmu_dist.scaling.number_columns import NumberColumn
from lmu_dist.scaling.numbers import is_state
from lmu_dist.scaling.table import LeftOutRows
from lmu_dist.scaling.table_text import RawTable

SHOWN_WORDS = 3
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
RUN_COLUMNS = {"run", "run_name", "name", "id", "run_id", "model", "label"}  # may have such a word, besides the first column


class RowsLeftOut:
    """Which rows (indices from 0) are still used, and for which reasons the others are not: the first reason of each counts."""

    def __init__(self, n_rows: int) -> None:
        self.used, self._reasons = [True] * n_rows, dict[str, list[int]]()

    def add(self, reason: str, rows: Sequence[int]) -> None:
        """Leaves out rows, given by their indices."""
        for row in rows:
            if self.used[row]:
                self.used[row] = False
                self._reasons.setdefault(reason, []).append(row + 1)

    def kept(self) -> list[int]:
        """Returns the indices of the rows that are still used."""
        return [row for row, used in enumerate(self.used) if used]

    def by_reason(self) -> list[LeftOutRows]:
        """Returns the rows left out, by reason, with their numbers from 1."""
        return [LeftOutRows(reason, tuple(sorted(rows))) for reason, rows in self._reasons.items()]


def leave_out_lines(raw: RawTable, needed: Sequence[tuple[Sequence[Any], str]], left_out: RowsLeftOut) -> None:
    """Leaves out rows that are no runs: a header that is repeated, and totals or means below the table.

    `needed` has the columns that are asked for, with their names.
    """
    n_rows = len(left_out.used)
    left_out.add("repeats the header", [i for i in range(n_rows) if all(values[i] == name for values, name in needed)])
    labels = [c for i, (name, c) in enumerate(zip(raw.names, raw.columns, strict=True)) if i == 0 or _names_runs(name)]
    summaries = _summary_rows([*(values for values, _ in needed), *labels], n_rows)
    left_out.add("a total or mean below the table", summaries)


def _names_runs(name: str) -> bool:
    return name.lower().rpartition(".")[2] in RUN_COLUMNS


def _summary_rows(columns: Sequence[Sequence[Any]], n_rows: int) -> list[int]:
    """Returns the rows at the end of which each has a word such as total in one of the columns.

    "max" may also be a setting of runs. So no row is one if its word occurs further above, or in several of these rows.
    """
    rows, words = list[int](), set[str]()
    for i in reversed(range(n_rows)):
        found = {_word(column[i]) for column in columns} & SUMMARIES
        if not found:
            break
        rows.append(i)
        words |= found
    above = {_word(column[i]) for column in columns for i in range(n_rows - len(rows))} if rows else set[str]()
    return [] if words & above or len(rows) > len(words) else rows


def _word(cell: Any) -> str:
    return cell.strip().strip(":").lower() if isinstance(cell, str) else ""


def leave_out_incomplete(columns: Mapping[str, NumberColumn], left_out: RowsLeftOut) -> None:
    """Leaves out the rows in which a cell is no number: missing, a word such as diverged, or for a loss not finite."""
    if next(iter(columns.values())).units_row:
        left_out.add("has units", [0])
    for option, column in sorted(columns.items(), key=lambda item: item[0] != "--loss"):
        kinds = [cell.kind for cell in column.cells]
        if option == "--loss":
            no_loss = [i for i, kind in enumerate(kinds) if kind in ("missing", "not finite")]
            left_out.add(f"{column.name} is missing or not finite", no_loss)
        else:
            is_nan = ["nan" in cell.text.lower() and cell.kind == "not finite" for cell in column.cells]
            left_out.add(f"{column.name} is missing", [i for i, kind in enumerate(kinds) if kind == "missing" or is_nan[i]])
        words = [i for i, kind in enumerate(kinds) if kind == "word" and left_out.used[i]]
        shown = list(dict.fromkeys(column.cells[i].text for i in words))
        more = ", ..." if len(shown) > SHOWN_WORDS else ""
        left_out.add(f"{column.name} is not a number ({', '.join(map(repr, shown[:SHOWN_WORDS]))}{more})", words)


def leave_out_diverged(labels: Sequence[str], columns: Mapping[str, NumberColumn], name: str, left_out: RowsLeftOut) -> None:
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


def leave_out_all_but_last(
    labels: Sequence[str], columns: Mapping[str, NumberColumn], name: str, left_out: RowsLeftOut, table: str
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
