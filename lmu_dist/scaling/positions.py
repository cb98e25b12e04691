"""Loss by position in the row: how far back a family's context helps (the paper's figure 4), and what it is worth in tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lmu_dist.scaling.efficiency import Factor, SeedNoise, curve, from_curves
from lmu_dist.scaling.laws import Floats

BINS_PER_DOUBLING = 2
LEVEL_NATS = 0.02  # a bin this near to the later ones is level with them
ERRORS = 2.0  # standard errors of a difference that can be told


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


@dataclass(frozen=True)
class Level:
    """From which position a loss is level: no later bin is lower by more than LEVEL_NATS. None: it falls to the end.

    `resolution` is the difference in nats that bins can tell, two standard errors, at the position or in the last bins;
    where it is above LEVEL_NATS nothing is determined.
    """

    position: int | None
    resolution: float

    @property
    def determined(self) -> bool:
        """Whether the bins can tell a level from a fall."""
        return self.resolution <= LEVEL_NATS


def level_from(bins: Binned) -> Level:
    """Looks from the end for the first bin above a later one."""
    loss, error = np.array(bins.loss), np.nan_to_num(np.array(bins.error), nan=np.inf)  # a bin of one: who knows
    start = len(loss) - 1
    while start > 0 and np.all(loss[start - 1] - loss[start:] <= LEVEL_NATS):
        start -= 1
    level = start < len(loss) - 1
    seen = error[start:] if level else error[-2:]
    resolution = ERRORS * float(np.max(np.hypot(seen[0], seen[1:])))
    return Level(bins.first[start] if level else None, resolution)


def factors(
    base: Mapping[int, Sequence[Floats]], new: Mapping[int, Sequence[Floats]], noise: SeedNoise
) -> list[tuple[int, int, Factor]]:
    """The data-efficiency factor in every bin of positions, (first, last, factor), from the curves by position at each budget.

    `base` and `new`: for every budget in tokens the losses by position, (n,), of its seeds, at one size. The noise of a bin
    is that of a seed and, since a bin has few tokens, that of its mean.
    """
    means = [{tokens: binned(np.mean(list(seeds), axis=0)) for tokens, seeds in family.items()} for family in (base, new)]
    n_seeds = [min(len(seeds) for seeds in family.values()) for family in (base, new)]
    some, found = next(iter(means[0].values())), list[tuple[int, int, Factor]]()
    for i, (first, last) in enumerate(zip(some.first, some.last, strict=True)):
        relative = [bins.error[i] / bins.loss[i] for family in means for bins in family.values()]
        if not np.all(np.isfinite(relative)):  # a bin of one position
            continue
        # Seeds see the same validation rows, so the error of a bin does not shrink with them as their noise does.
        spread = SeedNoise(float(np.hypot(noise.deviation, np.mean(relative) * np.sqrt(min(n_seeds)))), noise.freedom)
        curves = [curve(list(family), [bins.loss[i] for bins in family.values()]) for family in means]
        found.append((first, last, from_curves(curves[0], curves[1], spread, (n_seeds[0], n_seeds[1]))))
    return found
