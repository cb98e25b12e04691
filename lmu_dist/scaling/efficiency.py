"""The data-efficiency factor: how many times as many tokens a base family needs to reach the loss of a new family.

A factor of ten means that the base needs ten times the tokens. It is computed at one size, from curves of loss against tokens
or from fitted laws, and never beyond the losses that both families reached. A third measure compares losses at equal size and
tokens: the improvement over the base relative to the base's improvement over a third family.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lmu_dist.scaling.intervals import CONFIDENCE, Interval, bootstrap_interval
from lmu_dist.scaling.laws import Chinchilla, Floats
from lmu_dist.scaling.quantiles import normal_quantile, t_quantile

MIN_RESAMPLES = 50
MIN_CELLS = 8


@dataclass(frozen=True)
class Curve:
    """Loss against tokens at one size: the lower envelope, with tokens ascending and losses strictly falling."""

    tokens: Floats
    loss: Floats

    def tokens_for(self, loss: ArrayLike) -> Floats:
        """Returns the tokens at which a loss is reached, by log-log interpolation; nan outside the range of the curve."""
        y = np.log(np.asarray(loss, np.float64))
        log_tokens = np.interp(y, np.log(self.loss[::-1]), np.log(self.tokens[::-1]))
        inside = (y >= np.log(self.loss[-1]) - 1e-12) & (y <= np.log(self.loss[0]) + 1e-12)
        return np.where(inside, np.exp(log_tokens), np.nan)


@dataclass(frozen=True)
class Factor:
    """A data-efficiency factor, or the reason why there is none.

    `losses` is the range of losses that both families reached, highest first, and `ends` are the factors at its two ends.
    `value` is the geometric mean over that range (curves) or the factor at its middle (laws), `interval` its 90 % interval.
    Without a common loss only a `bound` is known: the factor is above (`>`) or below (`<`) it. `remark` says why the value or
    its interval is missing.
    """

    value: float | None
    interval: Interval | None
    losses: Interval | None
    ends: Interval | None
    bound: tuple[str, float] | None
    remark: str

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None


@dataclass(frozen=True)
class SeedNoise:
    """Seed noise: the standard deviation of ln loss between seeds, or of a sum of such, and its degrees of freedom."""

    deviation: float
    freedom: float


def lower_envelope(tokens: ArrayLike, loss: ArrayLike) -> Curve:
    """Returns the curve through the runs of one size: seeds averaged, points that are no lower than an earlier one dropped."""
    d, y = np.asarray(tokens, np.float64), np.asarray(loss, np.float64)
    budgets = np.unique(d)
    means = np.array([np.exp(np.log(y[d == budget]).mean()) for budget in budgets])
    falls = means < np.concatenate([[np.inf], np.minimum.accumulate(means)[:-1]])
    return Curve(budgets[falls], means[falls])


def factor_from_curves(base: Curve, new: Curve) -> Factor:
    """Returns the factor between two curves, without an interval or the reason for this (`curve_factor` has them)."""
    top, bottom = float(min(base.loss[0], new.loss[0])), float(max(base.loss[-1], new.loss[-1]))
    if top < bottom:
        return _bound_without_common_loss(base, new)
    if top == bottom:
        value = float(base.tokens_for(top) / new.tokens_for(top))
        return Factor(value, None, (top, top), (value, value), None, "the families have only one loss in common")
    knots = np.concatenate([base.loss, new.loss, [top, bottom]])
    losses = np.unique(knots[(knots <= top) & (knots >= bottom)])[::-1]
    logs = np.log(base.tokens_for(losses) / new.tokens_for(losses))
    value = _mean_log_factor(losses, logs)
    ends = (float(np.exp(logs[0])), float(np.exp(logs[-1])))
    return Factor(float(np.exp(value)), None, (top, bottom), ends, None, "")


def factor_from_laws(
    base: Chinchilla,
    new: Chinchilla,
    n_params: float,
    token_ranges: tuple[Interval, Interval],
    resamples: Sequence[tuple[Chinchilla, Chinchilla]] = (),
    correction: float = 1.0,
) -> Factor:
    """Returns the factor between two laws at one size, for the losses that both reach within their `token_ranges` (min, max).

    `resamples` are pairs of laws fitted to the same resample of runs; the interval comes from them.
    """
    starts = [float(law.loss(n_params, d[0])) for law, d in zip((base, new), token_ranges, strict=True)]
    ends = [float(law.loss(n_params, d[1])) for law, d in zip((base, new), token_ranges, strict=True)]
    top, bottom = min(starts), max(ends)
    if not top > bottom:
        curves = [Curve(np.array(d), np.array([a, b])) for d, a, b in zip(token_ranges, starts, ends, strict=True)]
        return _bound_without_common_loss(*curves)
    middle = float(np.sqrt(top * bottom))
    losses = np.array([top, middle, bottom])
    first, value, last = (float(f) for f in base.tokens_for(losses, n_params) / new.tokens_for(losses, n_params))
    resampled = np.array([float(b.tokens_for(middle, n_params) / w.tokens_for(middle, n_params)) for b, w in resamples])
    interval = bootstrap_interval(value, resampled, correction) if len(resampled) >= MIN_RESAMPLES else None
    remark = "" if interval else "too few resampled laws reach the compared losses"
    return Factor(value, interval, (top, bottom), (first, last), None, remark)


@dataclass(frozen=True)
class Improvement:
    """The ratio (middle - best) / (worst - middle) of three families' losses at equal size, tokens and seed.

    A ratio of 1 means that both steps are equally large. `gains` are the two differences in nats, with intervals if there are
    enough cells.
    """

    value: float | None
    interval: Interval | None
    n_cells: int
    gains: tuple[float, float] | None
    gain_intervals: tuple[Interval, Interval] | None
    remark: str


def improvement_ratio(losses: ArrayLike, weights: Floats | None = None) -> Improvement:
    """Returns the ratio for losses (cells, 3) of three families, the supposedly best first.

    `weights` (resamples, cells) are bootstrap weights for the intervals. The ratio is not determined if the middle family is
    not clearly better than the worst, since its denominator may then be zero.
    """
    y = np.asarray(losses, np.float64).reshape(-1, 3)
    n = len(y)
    if not n:
        return Improvement(None, None, 0, None, None, "the three families have no size, budget and seed in common")
    above, below = y[:, 1] - y[:, 0], y[:, 2] - y[:, 1]
    gains = (float(above.mean()), float(below.mean()))
    if weights is None or n < MIN_CELLS:
        return Improvement(
            None, None, n, gains, None, f"the families have {n} cells in common; a ratio with an interval needs {MIN_CELLS}"
        )
    share = weights / weights.sum(axis=1, keepdims=True)
    groups = len(np.unique(weights, axis=1).T)  # cells with the same weights are one group
    if groups < 2:
        remark = "all cells have one size and seed, and so their noise in common; add another size or seed"
        return Improvement(None, None, n, gains, None, remark)
    ends = (_percentile_interval(gains[0], share @ above, groups), _percentile_interval(gains[1], share @ below, groups))
    if ends[1][0] <= 0:
        order = "is worse than" if ends[1][1] < 0 else "is not clearly better than"
        return Improvement(None, None, n, gains, ends, f"the second family {order} the third, so the ratio has no meaning")
    value = gains[0] / gains[1]
    return Improvement(value, _percentile_interval(value, (share @ above) / (share @ below), groups), n, gains, ends, "")


def _percentile_interval(best: float, resampled: Floats, n: int) -> Interval:
    """Returns the percentiles of resampled means, widened by the small-sample correction for n cells (t instead of normal)."""
    upper = (1 + CONFIDENCE) / 2
    wider = n / (n - 1) * t_quantile(upper, n - 1) / normal_quantile(upper)
    low, high = np.percentile(resampled, [100 * (1 - upper), 100 * upper])
    return best + wider * (float(low) - best), best + wider * (float(high) - best)


def _mean_log_factor(losses: Floats, logs: Floats) -> float:
    """Returns the mean of ln f over ln L, by the trapezoidal rule."""
    x = np.log(losses)
    return float(np.trapezoid(logs, x) / (x[-1] - x[0]))


def _bound_without_common_loss(base: Curve, new: Curve) -> Factor:
    """Returns the bound on the factor for two curves that have no loss in common."""
    if new.loss[0] < base.loss[-1]:
        limit = float(base.tokens[-1] / new.tokens[0])
        gap = f"the lowest loss of the base, {base.loss[-1]:.4g}, is above the highest of the new family, {new.loss[0]:.4g}"
        remedy = "train the base on more tokens or the new family on fewer"
        return Factor(None, None, None, None, (">", limit), f"{gap}; {remedy}")
    limit = float(base.tokens[0] / new.tokens[-1])
    gap = f"the highest loss of the base, {base.loss[0]:.4g}, is below the lowest of the new family, {new.loss[-1]:.4g}"
    remedy = "train the base on fewer tokens or the new family on more"
    return Factor(None, None, None, None, ("<", limit), f"{gap}; {remedy}")
