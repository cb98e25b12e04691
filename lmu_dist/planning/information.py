"""What runs say about the coordinates of a law: rows of its Jacobian in, the variance of what is computed from it out.

The design is sequential and V-optimal: a run adds one row. Called by design, learn and next_cell.
"""

from collections.abc import Sequence

import numpy as np

from lmu_dist.scaling.fit import n_parameters
from lmu_dist.scaling.laws import Chinchilla, Floats

# Standard deviations of ln E, ln A, ln B, alpha and beta before any run, with N and D in units of their geometric means. They
# only keep the information of few runs invertible.
PRIOR_DEVIATIONS = np.array([1.0, 1.0, 1.0, 0.5, 0.5])
N_PARAMETERS = n_parameters(Chinchilla)


class Information:
    """What runs say about the coordinates of a family's law, and the covariance of their estimate by least squares.

    `variance` is that of a run's ln L, `common` the covariance of two runs of a group.
    """

    def __init__(self, variance: float, common: float) -> None:
        prior = variance * np.diag(PRIOR_DEVIATIONS**-2)
        self._variance, self._common = variance, common
        self._products = prior  # sum of the outer products of rows
        self._spread = variance * prior  # covariance of the weighted sum of errors
        self._sums = dict[str, Floats]()  # of the rows of every group
        self._inverse: Floats | None = None

    def copy(self) -> "Information":
        """An independent copy."""
        made = Information(self._variance, self._common)
        made._products, made._spread, made._sums = self._products.copy(), self._spread.copy(), dict(self._sums)
        return made

    def add(self, row: Floats, group: str) -> None:
        """Adds a run with this gradient of ln L."""
        outer, before = np.outer(row, row), self._sums.get(group, np.zeros(N_PARAMETERS))
        crossed = np.outer(row, before)
        self._products = self._products + outer
        self._spread = self._spread + self._variance * outer + self._common * (crossed + crossed.T)
        self._sums[group] = before + row
        self._inverse = None

    def variances(self, gradient: Floats, rows: Floats | None = None, groups: Sequence[str] = ()) -> Floats:
        """The variance of a number with a gradient; with `rows` (runs, 5) that after each of these runs by itself, (runs)."""
        if self._inverse is None:
            self._inverse = np.asarray(np.linalg.inv(self._products), np.float64)
        weights = self._inverse @ gradient
        if rows is None:
            return np.asarray(weights @ self._spread @ weights)
        moved = rows @ self._inverse
        after = weights - moved * ((rows @ weights) / (1 + np.einsum("ij,ij->i", moved, rows)))[:, None]
        sums = np.array([self._sums.get(group, np.zeros(N_PARAMETERS)) for group in groups])
        own, of_group = np.einsum("ij,ij->i", after, rows), np.einsum("ij,ij->i", after, sums)
        before = np.einsum("ij,jk,ik->i", after, self._spread, after)
        return before + self._variance * own**2 + 2 * self._common * own * of_group
