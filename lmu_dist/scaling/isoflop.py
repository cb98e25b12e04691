"""IsoFLOP parabolas (Hoffmann et al. 2022, approach 2): runs of equal compute in, the size of least loss out, if they show one.

The parabola biases the prefactor of N_opt by up to some ten per cent, more the wider the grid, even without noise; the exponent
is right. It is a cross-check of the laws, not a substitute.
"""

from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.table import Rows

FEWEST_POINTS = 4
SAME_COMPUTE = 1.12  # runs within this ratio count as equal compute: two sizes met within 2 %, two budgets cut to whole steps


@dataclass(frozen=True)
class Parabola:
    """Loss against ln N at one compute: the fitted coefficients (of ln N squared, ln N, 1), and where they are least."""

    flops: float
    sizes: tuple[float, ...]
    losses: tuple[float, ...]
    coefficients: tuple[float, float, float] | None
    n_params: float | None  # of least loss; None unless the guards hold
    reason: str

    def loss(self, n_params: Floats) -> Floats:
        """The parabola."""
        assert self.coefficients is not None
        return np.asarray(np.polyval(self.coefficients, np.log(n_params)), np.float64)


def parabolas(rows: Rows, flops: Floats) -> list[Parabola]:
    """One for every compute at which several sizes were trained, ascending. Guards: points enough, curved up, vertex inside."""
    found, order = list[Parabola](), np.argsort(flops)
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
        here = rows.n_params[group]
        losses = np.array([rows.loss[group][here == n].mean() for n in sizes])
        found.append(_parabola(float(np.exp(np.log(flops[group]).mean())), sizes, losses))
    return found


def frontier(found: list[Parabola]) -> tuple[float, float] | None:
    """(k, a) of N_opt = k C^a through the vertices, by least squares in logarithms; None below three of them."""
    points = [(p.flops, p.n_params) for p in found if p.n_params is not None]
    if len(points) < 3:
        return None
    log_c, log_n = np.log(np.array(points, np.float64)).T
    exponent, offset = np.polyfit(log_c, log_n, 1)
    return float(np.exp(offset)), float(exponent)


def _parabola(flops: float, sizes: Floats, losses: Floats) -> Parabola:
    x = np.log(sizes)
    shown = (flops, tuple(sizes.tolist()), tuple(losses.tolist()))
    if len(sizes) < FEWEST_POINTS:
        return Parabola(*shown, None, None, f"{len(sizes)} sizes; a parabola needs {FEWEST_POINTS}")
    a, b, c = (float(v) for v in np.polyfit(x, losses, 2))
    if a <= 0:
        return Parabola(*shown, (a, b, c), None, "not curved upwards: no least loss")
    vertex = -b / (2 * a)
    if not x[0] < vertex < x[-1]:
        return Parabola(*shown, (a, b, c), None, "the least loss is outside the sizes tried")
    return Parabola(*shown, (a, b, c), float(np.exp(vertex)), "")
