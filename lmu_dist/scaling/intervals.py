"""90 % intervals of fitted numbers: from a bootstrap over whole runs, and from objective profiles as a cross-check.

Runs that share a part of their noise form a group. Many groups are resampled whole; of few, runs are resampled one by one, and
the laws are spread as far as the shared part of the noise demands (`shared_noise`).
"""

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import numpy as np
from scipy.optimize import brentq

from lmu_dist.scaling.fit import Fit, refit
from lmu_dist.scaling.laws import Floats, ScalingLaw, parameter_names, parameters
from lmu_dist.scaling.minimise import minimise
from lmu_dist.scaling.objective import DELTA, Objective, log_residuals, losses, unit_of_loss
from lmu_dist.scaling.quantiles import f_quantile, normal_quantile, t_quantile
from lmu_dist.scaling.shared_noise import MIN_GROUPS, with_shared_noise
from lmu_dist.scaling.table import Rows, rows_are_copies

CONFIDENCE = 0.9
N_RESAMPLES = 1000
RESAMPLE_TOLERANCE = 1e-2  # gradient in units of DELTA^2; the remaining error is small compared with the interval
MAX_STEPS = 300  # a resample that needs more belongs to a law that is not determined
KINK_SHIFTS = (-0.3, -0.2, -0.13, -0.08, -0.04, -0.02, 0.02, 0.04, 0.08, 0.13, 0.2, 0.3)  # of a logarithm
# How far a profile looks from the best value, in units of it.
REACH_TOWARDS_ZERO, REACH_AWAY_FROM_ZERO = 0.62, 82.0
MIN_SHARE = 0.95  # share of the resamples that must have a valid value, otherwise there is no interval

Interval = tuple[float, float]


def bootstrap_weights(labels: Sequence[str], n_resamples: int = N_RESAMPLES, seed: int = 0) -> Floats:
    """Returns weights (n_resamples, runs) of a Bayesian bootstrap: exponential with mean 1 (Rubin 1981).

    Weights keep every size and budget of a small grid in every resample; drawing runs with replacement would lose some. Runs
    with the same label get the same weights, in any table, so two families are resampled in pairs.
    """
    columns = {label: np.random.default_rng([seed, zlib.crc32(label.encode())]) for label in dict.fromkeys(labels)}
    by_label = {label: rng.exponential(size=n_resamples) for label, rng in columns.items()}
    return np.stack([by_label[label] for label in labels], axis=1)


def resampled_units(rows: Rows, labels: Sequence[str]) -> list[str]:
    """Returns what a bootstrap resamples, as a label per row: groups with the same label, or runs if there are few groups.

    Copies of a run stay together. A run of a group is named by its budget, so that other tables with such groups have it, too.
    A table of many groups and one of few share no names: what is computed from both then has too wide an interval.
    """
    if len(set(labels)) >= MIN_GROUPS or rows_are_copies(rows, labels):
        return list(labels)
    return [f"{label}/{tokens:.12g}" for label, tokens in zip(labels, rows.tokens.tolist(), strict=True)]


def resample(
    fit: Fit, rows: Rows, labels: Sequence[str], n_resamples: int = N_RESAMPLES, seed: int = 0, first: int = 0
) -> list[ScalingLaw]:
    """Returns the laws of resamples `first` to `n_resamples` of a table whose rows with the same label share noise."""
    units = resampled_units(rows, labels)
    laws = fit_resamples(fit, rows, bootstrap_weights(units, n_resamples, seed)[first:])
    return with_shared_noise(laws, fit, rows, labels) if len(set(units)) > len(set(labels)) else laws


def fit_resamples(fit: Fit, rows: Rows, weights: Floats) -> list[ScalingLaw]:
    """Returns the law fitted to every resample, in the order of `weights` (n_resamples, runs)."""
    if not len(weights):
        return []
    form, constraints = type(fit.law), fit.constraints
    objective, basis = Objective(form, rows), constraints.basis(form)
    starts = np.repeat(objective.vector(fit.law)[None], len(weights), axis=0)
    relative = weights / weights.mean(axis=1, keepdims=True)
    optima = minimise(objective, starts, relative, basis, RESAMPLE_TOLERANCE, far=0, max_steps=MAX_STEPS)
    if form.KINK and form.KINK not in constraints.names():  # every resample has the best of several values
        column = parameter_names(form).index(form.KINK)
        for shift in KINK_SHIFTS:
            starts = optima.vectors.copy()
            starts[:, column] = objective.vector(fit.law)[column] + shift
            other = minimise(objective, starts, relative, basis, RESAMPLE_TOLERANCE, far=0, max_steps=MAX_STEPS)
            lower = other.values < optima.values
            optima.vectors[lower], optima.values[lower] = other.vectors[lower], other.values[lower]
    return [objective.law(vector) for vector in optima.vectors]


def small_sample_correction(fit: Fit, rows: Rows, labels: Sequence[str]) -> float:
    """Returns the small-sample correction of the standard deviation of `resample`'s laws, a factor of at least 1.

    It has two causes: fitted parameters shrink the residuals, by p/n on average, and with them the spread of the resamples
    (White's HC3 corrects the same); and few degrees of freedom require a t in place of a normal distribution. Both hold for
    least squares. A fit whose residuals are mostly beyond DELTA minimises absolute errors, for which the bootstrap is, if
    anything, too wide and needs no correction. In between, the correction is applied to the share of residuals within DELTA.
    """
    n_groups = len(set(resampled_units(rows, labels)))
    dof = n_groups - fit.n_free
    if dof < 1:
        return 1.0
    upper = (1 + CONFIDENCE) / 2
    full = n_groups / dof * t_quantile(upper, dof) / normal_quantile(upper)
    quadratic_share = 1.0 if fit.law.LEAST_SQUARES else float(np.mean(np.abs(log_residuals(fit.law, rows)) <= DELTA))
    return 1 + quadratic_share * (full - 1)


def bootstrap_interval(best: float, values: Floats, correction: float = 1.0) -> Interval | None:
    """Returns the interval of a number from its resamples: best x exp(-+ 1.645 standard deviations of their logarithm).

    The standard deviation is multiplied by `correction`. Percentiles are not used: because laws are nonlinear, resamples are
    shifted from the fit just as the fit is shifted from the truth, and intervals from percentiles contain the truth too often
    on wide grids and too rarely on small ones (benchmarks/intervals.py). Resamples beyond four standard deviations, estimated
    from the middle 68 %, are clipped there. Returns None if too many resamples have no valid value.
    """
    known = values[np.isfinite(values) & (np.sign(values) == np.sign(best)) & (values != 0)]
    if not np.isfinite(best) or len(known) < max(MIN_SHARE * len(values), 20):
        return None
    logs = np.log(np.abs(known))
    low, middle, high = np.percentile(logs, [15.87, 50, 84.13])
    clipped = np.clip(logs, middle - 4 * (high - low) / 2, middle + 4 * (high - low) / 2)
    reach = float(correction * normal_quantile((1 + CONFIDENCE) / 2) * clipped.std())
    ends = sorted((best * float(np.exp(-reach)), best * float(np.exp(reach))))
    return ends[0], ends[1]


def parameter_intervals(best: ScalingLaw, laws: Sequence[ScalingLaw], correction: float = 1.0) -> dict[str, Interval]:
    """Returns the intervals of the parameters of a law, from the laws of its resamples."""
    values = [parameters(law) for law in laws]
    intervals = {
        name: bootstrap_interval(value, np.array([v[name] for v in values]), correction)
        for name, value in parameters(best).items()
    }
    return {name: interval for name, interval in intervals.items() if interval is not None}


def profile_interval(fit: Fit, rows: Rows, name: str) -> tuple[Interval | None, ScalingLaw | None]:
    """Returns the profile interval of E or an exponent: the values up to which the refitted objective rises to a limit.

    The objective is not a likelihood, so its rise is scaled by E[psi^2]/E[psi'] of the residuals, as in robust regression, and
    compared with the F distribution. There is no interval if the objective never reaches the limit. The second result is a law
    with a lower objective than the fit's, if a refit on the way found one: then the fit must start again from it.
    """
    dof = len(rows) - fit.n_free
    if dof < 1:
        return None, None
    best = getattr(fit.law, name)
    allowed = 0.5 * f_quantile(CONFIDENCE, 1, dof) * residual_scale(fit.law, rows) * len(rows) / dof
    if not allowed > 0:
        return None, None
    lowest, better = fit.minimised_objective, None
    slack = 1e-6 * abs(lowest) + 1e-12 * DELTA**2 * len(rows)

    @cache
    def distance(value: float) -> float:
        """Returns the root of the rise, less that of the limit, which is about linear on each side of the best value.

        Every value starts anew from the fit, so the result depends on the value only.
        """
        nonlocal lowest, better
        if value == best:
            return -float(np.sqrt(allowed))
        refitted = refit(fit.law, rows, constraints=fit.constraints.holding(name, value), tolerance=1e-4)
        if refitted.minimised_objective < lowest - slack:
            lowest, better = refitted.minimised_objective, refitted.law
        rise = np.maximum(0.0, refitted.minimised_objective - fit.minimised_objective)  # keeps NaN
        return float(np.sqrt(rise) - np.sqrt(allowed))

    ends = [_profile_end(distance, best, direction) for direction in (-1, 1)]
    if ends[0] is None or ends[1] is None:
        return None, better
    return (ends[0], ends[1]), better


def _profile_end(distance: Callable[[float], float], best: float, direction: int) -> float | None:
    """Returns where `distance` becomes positive on one side of the best value; None if it does not within reach."""
    at_best, offset, inside = distance(best), 0.02 * abs(best), best
    farthest = abs(best) * (REACH_AWAY_FROM_ZERO if direction * best > 0 else REACH_TOWARDS_ZERO)
    while (at_outside := distance(best + direction * offset)) < 0:
        if offset == farthest:
            return None
        inside = best + direction * offset
        # A tenth beyond where a straight line would end; at most four times as far as now.
        line = offset * at_best / (at_best - at_outside) if at_outside > at_best else np.inf
        offset = min(max(1.1 * line, 1.5 * offset), 4 * offset, farthest)
    if not np.isfinite(at_outside):
        return inside if at_outside > 0 else None
    return cast(float, brentq(distance, inside, best + direction * offset, xtol=2e-4 * abs(best)))


def residual_scale(law: ScalingLaw, rows: Rows) -> float:
    """Returns E[psi^2] / E[psi'] of the residuals that the law's fit minimised; see `huber_scale`."""
    loss = losses(law, rows)
    if law.LEAST_SQUARES:
        return float(np.mean(((loss - rows.loss) / unit_of_loss(rows)) ** 2))
    return huber_scale(np.log(loss / rows.loss))


def huber_scale(residuals: Floats) -> float:
    """Returns E[psi^2] / E[psi'] of residuals of ln L: the unit in which twice a difference of Huber sums is chi-squared.

    psi' is taken by a finite difference as wide as the spread of the residuals, since Huber's jumps.
    """
    spread = 1.4826 * float(np.median(np.abs(residuals))) + 1e-300
    step = max(spread * len(residuals) ** -0.2, DELTA / 10)
    slope = np.mean(np.clip(residuals + step, -DELTA, DELTA) - np.clip(residuals - step, -DELTA, DELTA)) / (2 * step)
    return float(np.mean(np.clip(residuals, -DELTA, DELTA) ** 2) / max(slope, 1e-300))
