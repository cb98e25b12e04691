"""Loss by position in the sequence: up to which context length it falls (the paper's figure 4), and the factor per position."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from lmu_dist.scaling.curve_factor import factor_with_noise
from lmu_dist.scaling.efficiency import Factor
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.run_losses import RunLoss
from lmu_dist.scaling.trunk_noise import TrunkNoise

BINS_PER_DOUBLING = 2
PLATEAU_NATS = 0.02  # on the plateau no later bin is lower by more than this
STANDARD_ERRORS = 2.0  # a difference of so many standard errors is resolved


@dataclass(frozen=True)
class PositionBins:
    """Mean loss in nats per bin of positions, and its standard error; bin i is `first[i]` to `last[i]`, 1-based and inclusive.

    The error is estimated from differences of neighbouring positions in the bin; nan for a bin with one position.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    loss: tuple[float, ...]
    error: tuple[float, ...]


def bin_positions(losses: Floats) -> PositionBins:
    """Averages losses (n,) at positions 1 to n over bins of equal width in ln(position)."""
    n = len(losses)
    edges = np.unique(np.round(2 ** (np.arange(0, np.log2(n + 1) + 1e-9, 1 / BINS_PER_DOUBLING))).astype(int))
    edges = np.append(edges[edges <= 0.85 * n], n + 1)  # the last bin includes what would be a very narrow one
    first, last, mean, error = list[int](), list[int](), list[float](), list[float]()
    for start, stop in pairwise(edges):
        in_bin = losses[start - 1 : stop - 1]
        # Differences of neighbours, so that the trend inside the bin does not count as noise.
        noise = float(np.sqrt(np.square(np.diff(in_bin)).mean() / 2 / len(in_bin))) if len(in_bin) > 1 else float("nan")
        first.append(int(start))
        last.append(int(stop - 1))
        mean.append(float(in_bin.mean()))
        error.append(noise)
    return PositionBins(tuple(first), tuple(last), tuple(mean), tuple(error))


@dataclass(frozen=True)
class Plateau:
    """The position from which the loss stays level: no later bin is lower by more than PLATEAU_NATS.

    `position` is None if the loss falls to the end. `resolution` is two standard errors of a difference between bins, in nats,
    at the plateau or between the last two bins. If it exceeds PLATEAU_NATS the plateau is not determined.
    """

    position: int | None
    resolution: float

    @property
    def determined(self) -> bool:
        """Whether the bins are precise enough to distinguish a plateau from a falling loss."""
        return self.resolution <= PLATEAU_NATS


def find_plateau(bins: PositionBins) -> Plateau:
    """Finds the plateau: going back from the end, the bins up to the first that lies above a later one."""
    loss, error = np.array(bins.loss), np.nan_to_num(np.array(bins.error), nan=np.inf)  # a bin of one position has no error
    if len(loss) < 2:
        return Plateau(None, np.inf)
    start = len(loss) - 1
    while start > 0 and np.all(loss[start - 1] - loss[start:] <= PLATEAU_NATS):
        start -= 1
    has_plateau = start < len(loss) - 1
    errors = error[start:] if has_plateau else error[-2:]
    resolution = STANDARD_ERRORS * float(np.max(np.hypot(errors[0], errors[1:])))
    return Plateau(bins.first[start] if has_plateau else None, resolution)


def factors_by_position(
    base: Sequence[tuple[RunLoss, Floats]], new: Sequence[tuple[RunLoss, Floats]], noise: TrunkNoise
) -> list[tuple[int, int, Factor]]:
    """Returns the data-efficiency factor in every bin of positions, as (first, last, factor).

    `base` and `new` have the runs of a family at one size, each with its losses by position (n,). The noise of a bin is that of
    the mean loss between trunks plus the error of the bin's mean, which has few tokens.
    """
    families, factors = (base, new), list[tuple[int, int, Factor]]()
    of_runs = [[bin_positions(losses) for _, losses in runs] for runs in families]
    # All seeds are evaluated on the same validation rows, so more seeds reduce the seed noise but not the error of a bin.
    of_budgets = [{tokens: bin_positions(mean) for tokens, mean in _means(runs).items()} for runs in families]
    for i, (first, last) in enumerate(zip(of_runs[0][0].first, of_runs[0][0].last, strict=True)):
        errors = [{tokens: bins.error[i] / bins.loss[i] for tokens, bins in family.items()} for family in of_budgets]
        if not all(np.isfinite(error) for family in errors for error in family.values()):  # a bin of one position
            continue
        losses = [
            [replace(run, loss=bins.loss[i]) for (run, _), bins in zip(runs, binned, strict=True)]
            for runs, binned in zip(families, of_runs, strict=True)
        ]
        factor, _ = factor_with_noise(losses[0], losses[1], noise, (errors[0], errors[1]))
        factors.append((first, last, factor))
    return factors


def _means(runs: Sequence[tuple[RunLoss, Floats]]) -> dict[int, Floats]:
    """The mean losses by position of all seeds, by tokens."""
    by_tokens = defaultdict[int, list[Floats]](list)
    for run, losses in runs:
        by_tokens[run.tokens].append(losses)
    return {tokens: np.mean(of_seeds, axis=0) for tokens, of_seeds in by_tokens.items()}
