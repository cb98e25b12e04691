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

SAME_LOSS = 1e-12  # of ln L

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
    if factor.value is None or factor.losses is None or factor.losses[0] == factor.losses[1]:
        return factor, None
    if noise.overall is None:
        return replace(factor, remark="no size and budget was trained with two seeds"), None
    parts, common, weights = list[SeedNoise](), 0.0, loss_weights(curves[0], curves[1])
    for which, (runs, curve) in enumerate(zip((base, new), curves, strict=True)):
        of_budgets = dict(zip(curve.tokens.astype(int).tolist(), weights[which].tolist(), strict=True))
        parts += _noise_of_trunks(runs, of_budgets, noise)
        if common_errors is not None:
            shift = sum(abs(weight) * common_errors[which][tokens] for tokens, weight in of_budgets.items())
            common = float(np.hypot(common, shift))
    of_trunks = combine(parts)
    total = SeedNoise(float(np.hypot(of_trunks.deviation, common)), of_trunks.freedom)
    apart = reach(total)
    interval = factor.value * float(np.exp(-apart)), factor.value * float(np.exp(apart))
    return replace(factor, interval=interval, remark=""), total


def loss_weights(base: Curve, new: Curve) -> tuple[Floats, Floats]:
    """Returns the derivatives of the logarithm of the factor by ln L at every budget of both curves.

    The logarithm is the mean of a difference of straight lines over the common losses. A loss at an end of a curve may also
    move an end of that range.
    """
    curves = (base, new)
    top, bottom = np.log(min(c.loss[0] for c in curves)), np.log(max(c.loss[-1] for c in curves))
    value = np.log(factor_from_curves(base, new).value or np.nan)
    ends = [float(np.log(base.tokens_for(np.exp(y)) / new.tokens_for(np.exp(y)))) - value for y in (top, bottom)]
    at_end = [[abs(float(np.log(c.loss[i])) - y) < SAME_LOSS for c in curves] for i, y in ((0, top), (-1, bottom))]
    weights = list[Floats]()
    for which, (curve, sign) in enumerate(zip(curves, (1.0, -1.0), strict=True)):
        y, x = np.log(curve.loss), np.log(curve.tokens)
        high, low = np.minimum(y[:-1], top), np.maximum(y[1:], bottom)
        width, height = np.maximum(high - low, 0), y[:-1] - y[1:]
        share = width * (high + low - 2 * y[1:]) / (2 * height)  # of the segment's upper end, in nats of ln L
        rise = (x[1:] - x[:-1]) / height
        found = np.zeros(len(y))
        found[:-1] += sign * rise * share
        found[1:] += sign * rise * (width - share)
        if at_end[0][which]:
            found[0] += ends[0] / sum(at_end[0])
        if at_end[1][which]:
            found[-1] -= ends[1] / sum(at_end[1])
        weights.append(found / (top - bottom))
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
