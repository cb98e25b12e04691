"""Intervals of fitted numbers, 90 %: by a bootstrap over whole runs, and by profiles of the objective as a cross-check."""

import zlib
from collections.abc import Sequence
from typing import cast

import numpy as np
from scipy.optimize import brentq
from scipy.stats import f as f_distribution
from scipy.stats import norm
from scipy.stats import t as t_distribution

from lmu_dist.scaling.fit import DELTA, Fit, log_residuals, n_parameters, refit, unit_of_loss
from lmu_dist.scaling.laws import Floats, Law, parameters
from lmu_dist.scaling.table import Rows

LEVEL = 0.9
N_RESAMPLES = 1000
LOOSE = 1e-2  # gradient, in units of DELTA^2, at which a resample is near enough: far inside its interval
MOST_STEPS = 300  # where a resample needs more, nothing is determined
FEWEST = 0.95  # share of the resamples that must have an answer for there to be an interval

Interval = tuple[float, float]


def weights(labels: Sequence[str], n_resamples: int = N_RESAMPLES, seed: int = 0) -> Floats:
    """(n_resamples, runs): how much each run counts in each resample, exponential with mean 1 (Rubin 1981, "the Bayesian
    bootstrap").

    Random weights keep every rung of a small grid in every resample, where drawing runs would lose some. Runs with one label
    share their weight, also in another table: that is how two families are resampled in pairs.
    """
    columns = {label: np.random.default_rng([seed, zlib.crc32(label.encode())]) for label in dict.fromkeys(labels)}
    drawn = {label: rng.exponential(size=n_resamples) for label, rng in columns.items()}
    return np.stack([drawn[label] for label in labels], axis=1)


def resampled(fit: Fit, rows: Rows, drawn: Floats) -> list[Law]:
    """The law of every resample, in order."""
    return [refit(fit.law, rows, weights=w / w.mean(), tolerance=LOOSE, most_steps=MOST_STEPS).law for w in drawn]


def widening(fit: Fit, rows: Rows, n_labels: int) -> float:
    """By what a resample's deviation is too small: parameters fitted to few runs, and a t in place of a normal distribution.

    Both hold for least squares, where leverage shrinks residuals by p/n on average, and resamples with them (White's HC3
    makes good for the same). A fit whose residuals are mostly beyond DELTA is one of least absolute errors, of which
    resamples tell the deviation, if anything, too wide; between the two it is a matter of shares.
    """
    dof = n_labels - n_parameters(type(fit.law))
    if dof < 1:
        return 1.0
    upper = (1 + LEVEL) / 2
    full = float(n_labels / dof * t_distribution.ppf(upper, dof) / norm.ppf(upper))
    squared = 1.0 if fit.law.SQUARES else float(np.mean(np.abs(log_residuals(fit.law, rows)) <= DELTA))
    return 1 + squared * (full - 1)


def around(best: float, values: Floats, widen: float = 1.0) -> Interval | None:
    """The interval of a number from its resamples: best x exp(-+ 1.645 deviations of their logarithm), widened.

    Not their percentiles: fits bend, so that resamples lie to one side of the fit as fits do of the truth, and percentiles
    hold the truth too often on wide grids, too seldom on small ones (benchmarks/intervals.py). Resamples beyond four
    deviations, by the middle 68 %, count as if they were there. None when too many are missing for any of this to mean
    something.
    """
    known = values[np.isfinite(values) & (np.sign(values) == np.sign(best)) & (values != 0)]
    if not np.isfinite(best) or len(known) < max(FEWEST * len(values), 20):
        return None
    logs = np.log(np.abs(known))
    low, middle, high = np.percentile(logs, [15.87, 50, 84.13])
    clipped = np.clip(logs, middle - 4 * (high - low) / 2, middle + 4 * (high - low) / 2)
    reach = float(widen * norm.ppf((1 + LEVEL) / 2) * clipped.std())
    ends = sorted((best * float(np.exp(-reach)), best * float(np.exp(reach))))
    return ends[0], ends[1]


def of_parameters(best: Law, laws: Sequence[Law], widen: float = 1.0) -> dict[str, Interval]:
    """Intervals of the parameters of a law, from its resamples."""
    values = [parameters(law) for law in laws]
    found = {name: around(value, np.array([v[name] for v in values]), widen) for name, value in parameters(best).items()}
    return {name: interval for name, interval in found.items() if interval is not None}


def profile(fit: Fit, rows: Rows, name: str) -> Interval | None:
    """Where a parameter without units (E or an exponent) can go before the objective says no; None if it never does.

    The objective is no likelihood: its rise is measured in E[psi^2]/E[psi'] of its own residuals, as in robust regression, and
    compared with the F distribution.
    """
    dof = len(rows) - n_parameters(type(fit.law))
    if dof < 1:
        return None
    best = getattr(fit.law, name)
    allowed = 0.5 * float(f_distribution.ppf(LEVEL, 1, dof)) * _scale(fit.law, rows) * len(rows) / dof
    if not allowed > 0:
        return None
    last = fit.law

    def rise(value: float) -> float:
        nonlocal last
        found = refit(_with(last, name, value), rows, held=name, tolerance=1e-4)
        last = found.law if np.isfinite(found.minimised) else fit.law
        return found.minimised - fit.minimised - allowed

    ends = list[float]()
    for direction in (-1, 1):
        last, inside, step = fit.law, best, 0.02 * abs(best)
        for _ in range(12):
            outside = inside + direction * step
            if outside * best <= 0:
                return None
            if not rise(outside) < 0:
                break
            inside, step = outside, 2 * step
        else:
            return None
        crossed = rise(inside) < 0  # not so where the objective is all but flat: rounding
        ends.append(cast(float, brentq(rise, inside, outside, xtol=2e-4 * abs(best))) if crossed else inside)
    return ends[0], ends[1]


def _with(law: Law, name: str, value: float) -> Law:
    return type(law)(**{**parameters(law), name: value})


def _scale(law: Law, rows: Rows) -> float:
    """E[psi^2] / E[psi'] of the residuals, psi' by a difference over their spread, since Huber's is a spike."""
    loss = law.loss(rows.n_params, rows.tokens)
    if law.SQUARES:
        return float(np.mean(((loss - rows.loss) / unit_of_loss(rows)) ** 2))
    residual = np.log(loss / rows.loss)
    spread = 1.4826 * float(np.median(np.abs(residual))) + 1e-300
    step = max(spread * len(residual) ** -0.2, DELTA / 10)
    slope = np.mean(np.clip(residual + step, -DELTA, DELTA) - np.clip(residual - step, -DELTA, DELTA)) / (2 * step)
    return float(np.mean(np.clip(residual, -DELTA, DELTA) ** 2) / max(slope, 1e-300))
