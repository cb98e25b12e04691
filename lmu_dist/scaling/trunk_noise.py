"""The noise between trunks: losses of runs with several seeds in, the standard deviation of any sum of them out.

Budgets of a seed are not independent: with `wsd` a longer budget branches off the trunk of the shorter one, and otherwise they
still see the same data. So the unit is the trunk, which is one family, size and seed. A result from curves is, for small
errors, a sum of a trunk's ln L with a weight for each budget. The noise of such a sum is the standard deviation, between seeds,
of the same sum of measured losses, pooled over families and sizes. It holds however much of the error the budgets have in
common, and whatever the noise of each budget is; a sum over one budget has the noise at that budget. Every trunk but the first
of a family and size is a degree of freedom. benchmarks/intervals.py measures the intervals. Called by results, curve_factor and
planning/estimate.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from lmu_dist.scaling.efficiency import SeedNoise
from lmu_dist.scaling.intervals import CONFIDENCE
from lmu_dist.scaling.quantiles import t_quantile
from lmu_dist.scaling.run_losses import RunLoss
from lmu_dist.scaling.table import SIZE_BIN_RATIO

MIN_FREEDOM_OF_SUM = 4  # of the noise of a sum; with fewer the bound that needs only single budgets is taken, if it has more

Trunk = Mapping[int, float]  # ln L by tokens


class TrunkNoise:
    """The noise of the runs of a study.

    `overall` is the standard deviation of ln L pooled over all cells, for display; None if no cell has two seeds, and then
    nothing has a noise.
    """

    def __init__(self, losses: Sequence[RunLoss]) -> None:
        trunks = defaultdict[tuple[str, int], dict[str, dict[int, float]]](lambda: defaultdict(dict))
        for run in losses:
            trunks[run.family, run.n_params][run.group][run.tokens] = float(np.log(run.loss))
        self._groups = {key: list(of_group.values()) for key, of_group in trunks.items() if len(of_group) > 1}
        self._known = dict[tuple[tuple[tuple[int, float], ...], int], SeedNoise | None]()
        self.overall = self._overall()

    def of(self, weights: Mapping[int, float], n_params: int) -> SeedNoise | None:
        """Returns the noise of the sum of ln L of one trunk at size `n_params` with a weight for each budget (tokens).

        Trunks of another size have the same budgets if these are as many tokens, or as many tokens per parameter: what gives
        more degrees of freedom counts. If few trunks have all budgets, the noise is the sum of that of the budgets. If each
        budget has two seeds, this is right if all of the error is common, and too large otherwise.

        A budget without two seeds has the noise of the nearest smaller budget that has them. If only larger ones have them,
        it has the largest noise of any of these. So two things are assumed: noise does not grow with the budget, and budgets
        below all repeated ones are no noisier than the noisiest of these. Noise often falls with the budget, so the second
        may be false; then the result is too small, and only a second seed of the smallest budget mends this.

        None if no cell has two seeds.
        """
        used = {tokens: weight for tokens, weight in sorted(weights.items()) if weight}
        key = tuple(used.items()), n_params
        if key not in self._known:
            self._known[key] = self._of(used, n_params)
        return self._known[key]

    def at(self, tokens: int, n_params: int) -> SeedNoise | None:
        """Returns the noise of ln L of one run; if this budget has no two seeds, that of another, as `of` explains."""
        return self.of({tokens: 1.0}, n_params)

    def by_budget(self) -> dict[int, SeedNoise]:
        """Returns the noise of ln L of one run at every budget that has two seeds at any size, by tokens."""
        found = dict[int, SeedNoise]()
        for tokens in sorted({b for trunks in self._groups.values() for trunk in trunks for b in trunk}):
            # Families round tokens differently, so budgets that agree within the tolerance of `_sum` are one.
            if tokens <= max(found, default=0) * SIZE_BIN_RATIO:
                continue
            noise = self._pooled({tokens: 1.0}, None)
            if noise is not None:
                found[tokens] = noise
        return found

    def _of(self, weights: Mapping[int, float], n_params: int) -> SeedNoise | None:
        if self.overall is None:
            return None
        together = self._most_freedom(weights, n_params)
        if len(weights) == 1 and together is not None:
            return together
        if together is not None and together.freedom >= MIN_FREEDOM_OF_SUM:
            return together
        bound = self._bound(weights, n_params)
        return bound if together is None or bound.freedom > together.freedom else together

    def _most_freedom(self, weights: Mapping[int, float], n_params: int) -> SeedNoise | None:
        found = [noise for size in (None, n_params) if (noise := self._pooled(weights, size)) is not None]
        return max(found, key=lambda noise: noise.freedom, default=None)  # the first of equals: as many tokens

    def _pooled(self, weights: Mapping[int, float], n_params: int | None) -> SeedNoise | None:
        """The noise of a sum over all trunks with its budgets: as many tokens, or with a size as many tokens per parameter."""
        squares, freedom = 0.0, 0
        for (_, size), trunks in self._groups.items():
            scale = 1.0 if n_params is None else size / n_params
            sums = [total for trunk in trunks if (total := _sum(trunk, weights, scale)) is not None]
            if len(sums) > 1:
                squares += float(np.var(sums)) * len(sums)
                freedom += len(sums) - 1
        return SeedNoise(float(np.sqrt(squares / freedom)), freedom) if freedom else None

    def _bound(self, weights: Mapping[int, float], n_params: int) -> SeedNoise:
        deviation, freedom = 0.0, np.inf
        for tokens, weight in weights.items():
            noise = self._most_freedom({tokens: 1.0}, n_params) or self._borrowed(tokens)
            deviation += abs(weight) * noise.deviation
            freedom = min(freedom, noise.freedom)
        return SeedNoise(deviation, freedom)

    def _borrowed(self, tokens: int) -> SeedNoise:
        """The noise of a budget without two seeds."""
        repeated = self.by_budget()
        smaller = [budget for budget in repeated if budget < tokens]
        # Small budgets are often noisier, so the noise of a larger one is no bound; the largest noise is the best guess.
        return repeated[max(smaller)] if smaller else max(repeated.values(), key=lambda noise: noise.deviation)

    def _overall(self) -> SeedNoise | None:
        squares, of_cells, of_trunks = 0.0, 0, 0
        for trunks in self._groups.values():
            cells = defaultdict[int, list[float]](list)
            for trunk in trunks:
                for tokens, value in trunk.items():
                    cells[tokens].append(value)
            repeated = [values for values in cells.values() if len(values) > 1]
            squares += sum(float(np.var(values)) * len(values) for values in repeated)
            of_cells += sum(len(values) - 1 for values in repeated)
            of_trunks += len(trunks) - 1
        return SeedNoise(float(np.sqrt(squares / of_cells)), min(of_cells, of_trunks)) if of_cells else None


def combine(parts: Sequence[SeedNoise]) -> SeedNoise:
    """Returns the noise of a sum of independent errors whose noise was estimated from the same trunks.

    Its degrees of freedom are by Satterthwaite's rule for estimates that are wholly dependent: those of the parts if these are
    equal, and near those of the parts with most of the variance otherwise.
    """
    variances = np.array([part.deviation**2 for part in parts])
    if not variances.sum():
        return SeedNoise(0.0, min(part.freedom for part in parts))
    spread = variances / np.sqrt([part.freedom for part in parts])
    return SeedNoise(float(np.sqrt(variances.sum())), float((variances.sum() / spread.sum()) ** 2))


def reach(noise: SeedNoise) -> float:
    """Returns half the width of the 90 % interval of a number with this noise (Student's t)."""
    return t_quantile((1 + CONFIDENCE) / 2, noise.freedom) * noise.deviation


def _sum(trunk: Trunk, weights: Mapping[int, float], scale: float) -> float | None:
    """The weighted sum of a trunk's ln L at budgets that are `scale` times those of the weights; None if it lacks one."""
    total = 0.0
    for tokens, weight in weights.items():
        wanted = tokens * scale
        budget = tokens if scale == 1 and tokens in trunk else min(trunk, key=lambda b: abs(np.log(b / wanted)))
        if not wanted / SIZE_BIN_RATIO <= budget <= wanted * SIZE_BIN_RATIO:
            return None
        total += weight * trunk[budget]
    return total
