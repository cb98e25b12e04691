"""Tables for fitting laws: columns in, checked `Rows` out. The report makes them; scaling/read_table reads them from files."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]  # as in scaling/laws, which imports scipy: a message about a table need not wait for it
SIZE_BIN_RATIO = 1.05  # sizes (and budgets) within this ratio are in one bin; models meet a requested size within 2 %


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
    return budget_bins(values, np.zeros_like(values))


def budget_bins(planned_tokens: Floats, batch_tokens: Floats) -> Floats:
    """Returns, for the tokens of each run, the smallest number of tokens of its bin: runs of one bin have one budget.

    A budget is rounded up to whole batches, so runs with other batches have other tokens at one budget. The bins are those of
    `size_bins`, and also include what the rounding to the run's own batch explains, as `is_budget` says. Of runs with equal
    batches the second rule joins none.
    """
    bins, start = np.empty_like(planned_tokens), 0.0
    for i in np.lexsort((batch_tokens, planned_tokens)):
        tokens = float(planned_tokens[i])
        if not start or (tokens > start * SIZE_BIN_RATIO and not is_budget(start, tokens, float(batch_tokens[i]))):
            start = tokens
        bins[i] = start
    return bins


def is_budget(tokens: float, planned_tokens: float, batch_tokens: float) -> bool:
    """Returns whether a run of so many tokens has the budget `tokens`, which is rounded up to whole batches."""
    return 0 <= planned_tokens - tokens < max(batch_tokens, 1)


def rows_are_copies(rows: Rows, labels: Sequence[str]) -> bool:
    """Returns whether all rows with one label have the same N and D."""
    points = dict[str, tuple[float, float]]()
    pairs = zip(labels, rows.n_params.tolist(), rows.tokens.tolist(), strict=True)
    return all(points.setdefault(label, (n, d)) == (n, d) for label, n, d in pairs)
