"""The data-efficiency factor between measured curves, with the interval that the noise between trunks gives it.

Losses of two families at one size in, a `Factor` out. Called by compare, positions and planning/estimate, so that a report and
`ladder.until` mean the same interval.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lmu_dist.scaling.efficiency import Curve, Factor, SeedNoise, factor_from_curves, lower_envelope
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.run_losses import RunLoss
from lmu_dist.scaling.trunk_noise import TrunkNoise, combine, reach

STEP = 1e-5  # of ln L, for derivatives

BudgetErrors = Mapping[int, float]  # tokens: relative error of the loss that all seeds and budgets have in common


def factor_with_noise(
    base: Sequence[RunLoss],
    new: Sequence[RunLoss],
    noise: TrunkNoise,
    common_errors: tuple[BudgetErrors, BudgetErrors] | None = None,
) -> tuple[Factor, SeedNoise | None]:
    """Returns the factor between the curves of two families at one size, and the noise of its logarithm.

    ln factor is linearised in ln L: its error is a weighted sum of the errors of all budgets, taken trunk by trunk.
    `common_errors`, in standard deviations of ln L, are added; they are not reduced by more seeds.
    """
    curves = [lower_envelope([r.tokens for r in runs], [r.loss for r in runs]) for runs in (base, new)]
    factor = factor_from_curves(curves[0], curves[1])
    if noise.overall is None or factor.value is None:
        return factor, None
    if factor.losses is None or factor.losses[0] == factor.losses[1]:
        return factor, None
    parts = list[SeedNoise]()
    weights = loss_weights(curves[0], curves[1])
    for runs, curve, of_budgets in zip((base, new), curves, weights, strict=True):
        parts += _noise_of_trunks(runs, dict(zip(curve.tokens.astype(int).tolist(), of_budgets.tolist(), strict=True)), noise)
    if common_errors is not None:
        for curve, of_budgets, errors in zip(curves, weights, common_errors, strict=True):
            shift = sum(
                abs(w) * errors[tokens] for tokens, w in zip(curve.tokens.astype(int).tolist(), of_budgets, strict=True)
            )
            parts.append(SeedNoise(float(shift), np.inf))
    total = combine(parts)
    apart = reach(total)
    interval = factor.value * float(np.exp(-apart)), factor.value * float(np.exp(apart))
    return replace(factor, interval=interval, remark=""), total


def loss_weights(base: Curve, new: Curve) -> tuple[Floats, Floats]:
    """Returns the derivatives of the logarithm of the factor by ln L at every budget of both curves (central differences)."""
    curves, weights = (base, new), list[Floats]()
    for which in (0, 1):
        found = np.zeros(len(curves[which].loss))
        for i in range(len(found)):
            ends = list[float]()
            for step in (STEP, -STEP):
                moved = curves[which].loss.copy()
                moved[i] *= np.exp(step)
                pair = [Curve(c.tokens, moved) if j == which else c for j, c in enumerate(curves)]
                value = factor_from_curves(pair[0], pair[1]).value
                ends.append(np.log(value) if value is not None else np.nan)
            found[i] = np.nan_to_num((ends[0] - ends[1]) / (2 * STEP))
        weights.append(found)
    return weights[0], weights[1]


def _noise_of_trunks(runs: Sequence[RunLoss], weights: Mapping[int, float], noise: TrunkNoise) -> list[SeedNoise]:
    """The noise of a family's part of ln factor, trunk by trunk; a budget's weight is divided among its seeds."""
    n_seeds = Counter(run.tokens for run in runs)
    of_trunk = defaultdict[str, dict[int, float]](dict)
    for run in runs:
        if weights.get(run.tokens):
            of_trunk[run.group][run.tokens] = weights[run.tokens] / n_seeds[run.tokens]
    found = [noise.of(of_budgets, runs[0].n_params) for of_budgets in of_trunk.values()]
    return [part for part in found if part is not None]
