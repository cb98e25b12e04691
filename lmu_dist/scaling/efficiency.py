"""The data-efficiency factor: how many times the tokens a base family needs for the loss of a new one. No extrapolation.

Three ways to ask: from curves of loss against tokens at one size, from fitted laws at one size, and, for losses at equal
size and tokens, by the improvement over a third family. A factor of ten means: the base needs ten times the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm
from scipy.stats import t as t_distribution

from lmu_dist.scaling.intervals import LEVEL, Interval, around
from lmu_dist.scaling.laws import Chinchilla, Floats

FEWEST_RESAMPLES = 50
FEWEST_CELLS = 8


@dataclass(frozen=True)
class Curve:
    """Loss against tokens at one size: the monotone lower envelope, tokens ascending, losses falling strictly."""

    tokens: Floats
    loss: Floats

    def tokens_for(self, loss: ArrayLike) -> Floats:
        """Tokens until a loss is reached, log-log between the points; nan where the curve has not been."""
        y = np.log(np.asarray(loss, np.float64))
        found = np.interp(y, np.log(self.loss[::-1]), np.log(self.tokens[::-1]))
        inside = (y >= np.log(self.loss[-1]) - 1e-12) & (y <= np.log(self.loss[0]) + 1e-12)
        return np.where(inside, np.exp(found), np.nan)


@dataclass(frozen=True)
class Factor:
    """A factor, or why there is none.

    `losses` are those both have been seen at, from the highest to the lowest, and `ends` the factors there; `value` is the mean
    of ln f over them (curves) or the factor in their middle (laws), `interval` its at 90 %. Without a common loss a `bound` is
    known: the factor is above (`>`) or below (`<`) it. `remark` says why a number or its interval is missing.
    """

    value: float | None
    interval: Interval | None
    losses: Interval | None
    ends: Interval | None
    bound: tuple[str, float] | None
    remark: str

    @property
    def known(self) -> bool:
        """Whether there is a number."""
        return self.value is not None


@dataclass(frozen=True)
class SeedNoise:
    """What another seed changes: standard deviation of ln loss, pooled over all cells run with several, and its freedom."""

    deviation: float
    freedom: int


def curve(tokens: ArrayLike, loss: ArrayLike) -> Curve:
    """The curve through runs of one size: seeds averaged, then each point no higher than those before it."""
    d, y = np.asarray(tokens, np.float64), np.asarray(loss, np.float64)
    budgets = np.unique(d)
    means = np.array([np.exp(np.log(y[d == budget]).mean()) for budget in budgets])
    falls = means < np.concatenate([[np.inf], np.minimum.accumulate(means)[:-1]])
    return Curve(budgets[falls], means[falls])


def from_curves(base: Curve, new: Curve, noise: SeedNoise | None = None, n_seeds: tuple[int, int] = (1, 1)) -> Factor:
    """The factor between two curves. The interval takes the noise of a seed as one shift of each whole curve.

    That is what it is when budgets share a trunk, and is wide rather than narrow when they do not.
    """
    top, bottom = float(min(base.loss[0], new.loss[0])), float(max(base.loss[-1], new.loss[-1]))
    if top < bottom:
        return _apart(base, new)
    if top == bottom:
        value = float(base.tokens_for(top) / new.tokens_for(top))
        return Factor(value, None, (top, top), (value, value), None, "only one loss was seen of both")
    knots = np.concatenate([base.loss, new.loss, [top, bottom]])
    losses = np.unique(knots[(knots <= top) & (knots >= bottom)])[::-1]
    logs = np.log(base.tokens_for(losses) / new.tokens_for(losses))
    value = _mean_over(losses, logs)
    interval, remark = None, "no cell was run with two seeds"
    if noise is not None:
        # ln D against ln L: a shift of the loss by its noise moves the tokens by the local slope.
        slopes = [np.log(c.tokens_for(bottom) / c.tokens_for(top)) / np.log(top / bottom) for c in (base, new)]
        spread = noise.deviation * float(np.hypot(*(s / np.sqrt(n) for s, n in zip(slopes, n_seeds, strict=True))))
        reach = float(t_distribution.ppf((1 + LEVEL) / 2, noise.freedom)) * spread
        interval, remark = (float(np.exp(value - reach)), float(np.exp(value + reach))), ""
    ends = (float(np.exp(logs[0])), float(np.exp(logs[-1])))
    return Factor(float(np.exp(value)), interval, (top, bottom), ends, None, remark)


def from_laws(
    base: Chinchilla,
    new: Chinchilla,
    n_params: float,
    seen: tuple[Interval, Interval],
    resamples: Sequence[tuple[Chinchilla, Chinchilla]] = (),
    widen: float = 1.0,
) -> Factor:
    """The factor between two laws at one size, for the losses that both give within the tokens `seen` (least, most) of each.

    `resamples` are pairs of laws fitted to the same draw of runs: the interval is theirs.
    """
    starts = [float(law.loss(n_params, d[0])) for law, d in zip((base, new), seen, strict=True)]
    ends = [float(law.loss(n_params, d[1])) for law, d in zip((base, new), seen, strict=True)]
    top, bottom = min(starts), max(ends)
    if not top > bottom:
        curves = [Curve(np.array(d), np.array([a, b])) for d, a, b in zip(seen, starts, ends, strict=True)]
        return _apart(*curves)
    middle = float(np.sqrt(top * bottom))
    asked = np.array([top, middle, bottom])
    first, value, last = (float(f) for f in base.tokens_for(asked, n_params) / new.tokens_for(asked, n_params))
    drawn = np.array([float(b.tokens_for(middle, n_params) / w.tokens_for(middle, n_params)) for b, w in resamples])
    interval = around(value, drawn, widen) if len(drawn) >= FEWEST_RESAMPLES else None
    remark = "" if interval else "too few resamples reach the losses compared"
    return Factor(value, interval, (top, bottom), (first, last), None, remark)


def seed_noise(groups: Sequence[Sequence[float]]) -> SeedNoise | None:
    """Pools the losses of cells that differ in the seed only; None if no cell has two."""
    logs = [np.log(np.asarray(group)) for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in logs)
    if not freedom:
        return None
    return SeedNoise(float(np.sqrt(sum(float(np.square(g - g.mean()).sum()) for g in logs) / freedom)), freedom)


@dataclass(frozen=True)
class Improvement:
    """(middle - best) : (worst - middle) of losses at equal size, tokens and seed; 1 says "by as much".

    `gains` are the two differences in nats, each with its interval if there are cells enough.
    """

    value: float | None
    interval: Interval | None
    n_cells: int
    gains: tuple[float, float] | None
    gain_intervals: tuple[Interval, Interval] | None
    remark: str


def improvement(losses: ArrayLike, drawn: Floats | None = None) -> Improvement:
    """From the losses (cells, 3) of three families, best first as claimed, and weights (resamples, cells) to draw them anew.

    Undetermined if the middle family cannot be told from the worst: the ratio would be anything.
    """
    y = np.asarray(losses, np.float64).reshape(-1, 3)
    n = len(y)
    if not n:
        return Improvement(None, None, 0, None, None, "no size, budget and seed that all three families have run")
    above, below = y[:, 1] - y[:, 0], y[:, 2] - y[:, 1]
    gains = (float(above.mean()), float(below.mean()))
    if drawn is None or n < FEWEST_CELLS:
        return Improvement(None, None, n, gains, None, f"{n} cells in common; a ratio with an interval needs {FEWEST_CELLS}")
    share = drawn / drawn.sum(axis=1, keepdims=True)
    ends = (_widened(gains[0], share @ above, n), _widened(gains[1], share @ below, n))
    if ends[1][0] <= 0:
        order = "is no better than" if ends[1][1] < 0 else "cannot be told from"
        return Improvement(None, None, n, gains, ends, f"the middle family {order} the worst, so the ratio says nothing")
    value = gains[0] / gains[1]
    return Improvement(value, _widened(value, (share @ above) / (share @ below), n), n, gains, ends, "")


def _widened(best: float, drawn: Floats, n: int) -> Interval:
    """Percentiles of resampled means, wider by what n cells make a t of a normal distribution."""
    upper = (1 + LEVEL) / 2
    wider = float(n / (n - 1) * t_distribution.ppf(upper, n - 1) / norm.ppf(upper))
    low, high = np.percentile(drawn, [100 * (1 - upper), 100 * upper])
    return best + wider * (float(low) - best), best + wider * (float(high) - best)


def _mean_over(losses: Floats, logs: Floats) -> float:
    """Mean of ln f over ln L, trapezoidal."""
    x = np.log(losses)
    return float(np.trapezoid(logs, x) / (x[-1] - x[0]))


def _apart(base: Curve, new: Curve) -> Factor:
    """No loss in common: what is known is a bound."""
    if new.loss[0] < base.loss[-1]:
        limit = float(base.tokens[-1] / new.tokens[0])
        why = f"the base's best loss, {base.loss[-1]:.4g}, is above the first of the other, {new.loss[0]:.4g}"
        return Factor(
            None, None, None, None, (">", limit), f"{why}: more tokens for the base, or fewer for the other, would tell"
        )
    limit = float(base.tokens[0] / new.tokens[-1])
    why = f"the base's first loss, {base.loss[0]:.4g}, is below the best of the other, {new.loss[-1]:.4g}"
    return Factor(None, None, None, None, ("<", limit), f"{why}: fewer tokens for the base, or more for the other, would tell")
