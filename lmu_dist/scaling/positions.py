"""Loss by position in the row: how far back a family's context helps (the paper's figure 4), and what it is worth in tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lmu_dist.scaling.efficiency import Factor, SeedNoise, curve, from_curves
from lmu_dist.scaling.laws import Floats

BINS_PER_DOUBLING = 2
FLAT_NATS = 0.02  # a bin this near to the last ones counts as level with them
ERRORS = 2.0  # or nearer than so many standard errors


@dataclass(frozen=True)
class Binned:
    """Loss in bins of positions: each from `first[i]` to `last[i]`, 1-based and inclusive; mean in nats, its standard error.

    The error comes from the scatter of neighbouring positions in the bin; nan for a bin of one.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    loss: tuple[float, ...]
    error: tuple[float, ...]


def binned(losses: Floats) -> Binned:
    """Loss at positions 1 .. n, (n,), in bins of equal width in ln t."""
    n = len(losses)
    edges = np.unique(np.round(2 ** (np.arange(0, np.log2(n + 1) + 1e-9, 1 / BINS_PER_DOUBLING))).astype(int))
    edges = np.append(edges[edges <= 0.85 * n], n + 1)  # the last bin takes in what would be a sliver of one
    first, last, mean, error = list[int](), list[int](), list[float](), list[float]()
    for start, stop in pairwise(edges):
        here = losses[start - 1 : stop - 1]
        # Differences of neighbours: the trend inside a bin is not noise.
        noise = float(np.sqrt(np.square(np.diff(here)).mean() / 2 / len(here))) if len(here) > 1 else float("nan")
        first.append(int(start))
        last.append(int(stop - 1))
        mean.append(float(here.mean()))
        error.append(noise)
    return Binned(tuple(first), tuple(last), tuple(mean), tuple(error))


def flat_from(bins: Binned) -> int | None:
    """The position from which the loss is level: no later bin is lower by 0.02 nats, or two standard errors. None: never.

    A row whose last bin but one still falls to the last has not flattened.
    """
    loss, error = np.array(bins.loss), np.nan_to_num(np.array(bins.error), nan=np.inf)
    level = None
    for i in range(len(loss) - 1, -1, -1):
        falls = loss[i] - loss[i + 1 :]
        reach = np.maximum(FLAT_NATS, ERRORS * np.hypot(error[i], error[i + 1 :])) if len(falls) else falls
        if np.isfinite(error[i]) and np.all(falls <= reach):
            level = i
        else:
            break
    return None if level is None or level == len(loss) - 1 else bins.first[level]


def factors(
    base: Mapping[int, Sequence[Floats]], new: Mapping[int, Sequence[Floats]], noise: SeedNoise
) -> list[tuple[int, int, Factor]]:
    """The data-efficiency factor in every bin of positions, (first, last, factor), from the curves by position at each budget.

    `base` and `new`: for every budget in tokens the losses by position, (n,), of its seeds, at one size. The noise of a bin
    is that of a seed and, since a bin has few tokens, that of its mean.
    """
    means = [{tokens: binned(np.mean(list(seeds), axis=0)) for tokens, seeds in family.items()} for family in (base, new)]
    n_seeds = [max(len(seeds) for seeds in family.values()) for family in (base, new)]
    some, found = next(iter(means[0].values())), list[tuple[int, int, Factor]]()
    for i, (first, last) in enumerate(zip(some.first, some.last, strict=True)):
        relative = [bins.error[i] / bins.loss[i] for family in means for bins in family.values()]
        if not np.all(np.isfinite(relative)):  # a bin of one position
            continue
        spread = SeedNoise(float(np.hypot(noise.deviation, np.mean(relative))), noise.freedom)
        curves = [curve(list(family), [bins.loss[i] for bins in family.values()]) for family in means]
        found.append((first, last, from_curves(curves[0], curves[1], spread, (n_seeds[0], n_seeds[1]))))
    return found
