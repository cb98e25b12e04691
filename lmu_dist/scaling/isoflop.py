"""IsoFLOP parabolas (Hoffmann et al. 2022, approach 2): runs of equal compute in, the size with the lowest loss out.

Parabolas bias the prefactor of N_opt by up to about ten per cent even without noise, more for wider grids. If the sizes are
centred on the minimum at every compute, the bias is the same factor everywhere and the exponent is exact; if the centres drift
from the minimum with compute, the exponent is biased, too. They are a cross-check of the laws, not a substitute;
`scaling/optimum.py` takes the bias off.
"""

from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.table import Rows

MIN_SIZES = 4
SAME_COMPUTE = 1.12  # runs within this ratio have equal compute: sizes are met within 2 %, budgets are rounded to whole steps


@dataclass(frozen=True)
class Parabola:
    """A parabola of loss against ln N at one compute: its coefficients (of ln N squared, ln N, 1) and the N of its minimum."""

    flops: float
    sizes: tuple[float, ...]
    losses: tuple[float, ...]
    coefficients: tuple[float, float, float] | None
    n_params: float | None  # at the minimum; None if a check failed, then `reason` says which
    reason: str

    def loss(self, n_params: Floats) -> Floats:
        """Returns the loss of the parabola at the given sizes."""
        assert self.coefficients is not None
        return np.asarray(np.polyval(self.coefficients, np.log(n_params)), np.float64)


def fit_parabolas(rows: Rows, flops: Floats) -> list[Parabola]:
    """Fits a parabola at every compute with three sizes or more, ascending.

    A parabola has a minimum only if it has enough sizes, opens upwards, and the minimum lies within the sizes trained.
    """
    parabolas, order = list[Parabola](), np.argsort(flops)
    groups = list[list[int]]()
    for i in order:
        if groups and flops[i] <= flops[groups[-1][0]] * SAME_COMPUTE:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    for group in groups:
        sizes = np.unique(rows.n_params[group])
        if len(sizes) < 3:
            continue
        n_params = rows.n_params[group]
        losses = np.array([rows.loss[group][n_params == n].mean() for n in sizes])
        parabolas.append(_parabola(float(np.exp(np.log(flops[group]).mean())), sizes, losses))
    return parabolas


def optimal_size_power_law(parabolas: list[Parabola]) -> tuple[float, float] | None:
    """Returns (k, a) of N_opt = k C^a through the minima, by least squares of logarithms; None for fewer than three minima."""
    points = [(p.flops, p.n_params) for p in parabolas if p.n_params is not None]
    if len(points) < 3:
        return None
    log_c, log_n = np.log(np.array(points, np.float64)).T
    exponent, offset = np.polyfit(log_c, log_n, 1)
    return float(np.exp(offset)), float(exponent)


def _parabola(flops: float, sizes: Floats, losses: Floats) -> Parabola:
    x = np.log(sizes)
    points = (flops, tuple(sizes.tolist()), tuple(losses.tolist()))
    if len(sizes) < MIN_SIZES:
        return Parabola(*points, None, None, f"{len(sizes)} sizes; a parabola needs {MIN_SIZES}")
    a, b, c = (float(v) for v in np.polyfit(x, losses, 2))
    if a <= 0:
        return Parabola(*points, (a, b, c), None, "the parabola does not open upwards, so it has no minimum")
    vertex = -b / (2 * a)
    if not x[0] < vertex < x[-1]:
        return Parabola(*points, (a, b, c), None, "the minimum lies outside the sizes trained")
    return Parabola(*points, (a, b, c), float(np.exp(vertex)), "")
