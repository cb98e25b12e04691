"""Compute-optimal N and D for a budget of FLOPs by the approaches of Hoffmann et al. 2022: a comparison in, `Optimum` out.

1. envelope: of the losses of every size, interpolated in C, the lowest at each C; 2. parabola: of runs of equal C, the minimum
of a parabola in ln N; 3. parametric: from the laws. C = 6ND. The first two are biased even without noise: a parabola is not
the loss, and sizes are discrete; where the centres drift with compute, the exponent is biased, too. The bias is known from the
same procedure on losses that a law predicts for the same runs, and is taken off; if it is large, there is no result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmu_dist.scaling.compare_laws import LawComparison
from lmu_dist.scaling.fit import Fit
from lmu_dist.scaling.forecast import FAR, SO_FAR, far_points
from lmu_dist.scaling.intervals import CONFIDENCE, resample
from lmu_dist.scaling.isoflop import SAME_COMPUTE, fit_parabolas, optimal_size_power_law
from lmu_dist.scaling.laws import Floats, ScalingLaw
from lmu_dist.scaling.objective import log_residuals, losses
from lmu_dist.scaling.table import Rows, size_bins

FLOPS_PER_PARAMETER_TOKEN = 6.0
MAX_BIAS = 1.5  # of N, as a factor; beyond it the correction would be the result
N_SIMULATIONS = 200
MIN_CURVES, MIN_POINTS = 4, 3
EXPONENT_STEP = 1.05
N_RESAMPLES = 1000
APPROACHES = ("envelope", "parabola", "parametric")

PowerLawFit = tuple[float, float, tuple[float, float]]  # k and a of N_opt = k C^a, and the range of C it was fitted to


@dataclass(frozen=True)
class Optimum:
    """N and D of lowest loss at `flops` by one approach, with 90 % intervals, and a of N_opt ~ C^a near it.

    `bias` is the factor by which N of the approach is too large without noise, and was divided by. All numbers are None if
    there is no result; `reason` says why. `warnings` says how far C, N or D are beyond those of the table.
    """

    approach: str
    flops: float
    n_params: float | None = None
    n_interval: tuple[float, float] | None = None
    tokens: float | None = None
    d_interval: tuple[float, float] | None = None
    exponent: float | None = None
    exponent_interval: tuple[float, float] | None = None
    bias: float | None = None
    reason: str = ""
    warnings: tuple[str, ...] = ()


def optimum_of(comparison: LawComparison, flops: float, n_resamples: int = N_RESAMPLES) -> list[Optimum]:
    """Returns the optimum by all three approaches; each says why if it has no result.

    A law that does not fit the table has none: its minimum may be far from that of the losses, and its interval would be narrow
    all the same. Envelope and parabola have none outside the computes that they were fitted to.
    """
    return [_with_warnings(optimum, comparison.rows) for optimum in _optima(comparison, flops, n_resamples)]


def _with_warnings(optimum: Optimum, rows: Rows) -> Optimum:
    if optimum.n_params is None or optimum.tokens is None:
        return optimum
    known, warnings = _flops(rows), list[str]()
    above, below = optimum.flops / float(known.max()), float(known.min()) / optimum.flops
    if above > FAR:
        warnings.append(f"C is {above:,.4g} times the largest of the table: {SO_FAR}")
    if below > FAR:
        warnings.append(f"C is 1/{below:,.4g} of the smallest of the table: {SO_FAR}")
    warnings += far_points(rows, np.array([optimum.n_params]), np.array([optimum.tokens]))
    return replace(optimum, warnings=tuple(warnings))


def _optima(comparison: LawComparison, flops: float, n_resamples: int) -> list[Optimum]:
    if comparison.chosen is not None and not comparison.fits:
        tried = "no law fits" if len(comparison.candidates) > 1 else f"{comparison.chosen.name} does not fit"
        reason = f"{tried} the table" + ("" if len(comparison.candidates) > 1 else "; compare others by --law all")
        return [Optimum(name, flops, reason=reason) for name in APPROACHES]
    parametric = _parametric(comparison, flops, n_resamples)
    chosen = comparison.chosen
    if chosen is None or chosen.fit is None or parametric.n_params is None:
        reason = "without a law that is certified, its bias is unknown"
        return [*(Optimum(name, flops, reason=reason) for name in APPROACHES[:2]), parametric]
    return [
        _corrected("envelope", _envelope_power_law, chosen.fit, comparison, flops),
        _corrected("parabola", _parabola_power_law, chosen.fit, comparison, flops),
        parametric,
    ]


def _parametric(comparison: LawComparison, flops: float, n_resamples: int) -> Optimum:
    """Returns the optimum of the laws: of the chosen one, with the interval of all supported ones."""
    chosen = comparison.chosen
    if chosen is None or chosen.fit is None:
        return Optimum("parametric", flops, reason="; ".join(comparison.reasons))
    if chosen.form.NEEDS_UNIQUE:
        return Optimum("parametric", flops, reason="N and D of data that are repeated depend on the unique tokens")
    n, exponent = _optimum_and_exponent(chosen.fit.law, flops)
    if not np.isfinite(n):
        return Optimum("parametric", flops, reason="the loss of the chosen law has no minimum at this compute")
    draws = list[Floats]()
    for candidate in comparison.supported:
        assert candidate.fit is not None
        count = max(1, round(n_resamples * candidate.weight))
        laws = resample(candidate.fit, comparison.rows, comparison.labels, count)
        best = np.array(_optimum_and_exponent(candidate.fit.law, flops))
        found = np.array([_optimum_and_exponent(law, flops) for law in laws])
        spread = np.stack([np.log(found[:, 0] / best[0]), found[:, 1] - best[1]], axis=1) * comparison.correction
        draws.append(np.stack([np.log(best[0]) + spread[:, 0], best[1] + spread[:, 1]], axis=1))
    drawn = np.concatenate(draws)
    drawn = drawn[np.all(np.isfinite(drawn), axis=1)]
    return _with_intervals(Optimum("parametric", flops, n, exponent=exponent), drawn)


def _optimum_and_exponent(law: ScalingLaw, flops: float) -> tuple[float, float]:
    """Returns N of lowest loss, and d ln N / d ln C there."""
    near = np.array([flops / EXPONENT_STEP, flops, flops * EXPONENT_STEP])
    with np.errstate(all="ignore"):
        n, _ = law.optimum(near, FLOPS_PER_PARAMETER_TOKEN)
        return float(n[1]), float(np.log(n[2] / n[0]) / (2 * np.log(EXPONENT_STEP)))


def _with_intervals(optimum: Optimum, drawn: Floats) -> Optimum:
    """Adds intervals from draws (draws, 2) of ln N and of the exponent, around the optimum."""
    assert optimum.n_params is not None
    tail = 100 * (1 - CONFIDENCE) / 2
    (low, low_a), (high, high_a) = np.percentile(drawn, [tail, 100 - tail], axis=0)
    total = optimum.flops / FLOPS_PER_PARAMETER_TOKEN
    n_interval = (float(np.exp(low)), float(np.exp(high)))
    return replace(
        optimum,
        n_interval=n_interval,
        tokens=total / optimum.n_params,
        d_interval=(total / n_interval[1], total / n_interval[0]),
        exponent_interval=(float(low_a), float(high_a)),
    )


def _corrected(
    approach: str, procedure: Callable[[Rows], PowerLawFit | str], fit: Fit, comparison: LawComparison, flops: float
) -> Optimum:
    """Applies a procedure to the measured losses, takes off its bias, and simulates its spread from the law's residuals.

    Residuals are drawn again for every group of rows that are one run, as `_resampled` says.
    """
    law, rows = fit.law, comparison.rows
    measured, expected = procedure(rows), procedure(replace(rows, loss=losses(law, rows)))
    if isinstance(measured, str) or isinstance(expected, str):
        return Optimum(approach, flops, reason=measured if isinstance(measured, str) else str(expected))
    lowest, highest = measured[2]
    if not lowest / SAME_COMPUTE <= flops <= highest * SAME_COMPUTE:
        reason = f"its minima are at {lowest:.3g} to {highest:.3g} FLOPs, and it says nothing beyond these"
        return Optimum(approach, flops, reason=reason)
    true_n, true_exponent = _optimum_and_exponent(law, flops)
    bias = _size_at(expected, flops) / true_n
    if not 1 / MAX_BIAS < bias < MAX_BIAS:
        reason = f"biased: for losses without noise it returns {bias:.2g} times the N of lowest loss"
        return Optimum(approach, flops, bias=bias, reason=reason)
    n_groups = len(set(comparison.labels))
    residuals = log_residuals(law, rows) * np.sqrt(n_groups / max(n_groups - fit.n_free, 1))
    rng, drawn = np.random.default_rng(0), list[tuple[float, float]]()
    for _ in range(N_SIMULATIONS):
        simulated = procedure(replace(rows, loss=losses(law, rows) * np.exp(_resampled(residuals, comparison.labels, rng))))
        if not isinstance(simulated, str):
            drawn.append((np.log(_size_at(simulated, flops)), simulated[1]))
    if len(drawn) < 0.8 * N_SIMULATIONS:
        return Optimum(approach, flops, reason="the noise of the runs leaves too few minima")
    n, exponent = _size_at(measured, flops) / bias, measured[1] - (expected[1] - true_exponent)
    center = np.array([np.log(_size_at(expected, flops)), expected[1]])
    around = np.array([np.log(n), exponent]) + (np.array(drawn) - center)
    return _with_intervals(Optimum(approach, flops, n, exponent=exponent, bias=bias), around)


def _resampled(residuals: Floats, labels: Sequence[str], rng: np.random.Generator) -> Floats:
    """Returns residuals of simulated rows: any of all where rows are runs of their own, else with signs changed by group.

    Rows of one group keep the sizes of their residuals and change their signs together, as their errors are not independent: a
    wild bootstrap by cluster (Cameron, Gelbach and Miller 2008).
    """
    groups = np.unique(np.array(list(labels)), return_inverse=True)[1]
    n_groups = int(groups.max()) + 1
    if n_groups == len(residuals):
        return rng.choice(residuals, len(residuals))
    return residuals * rng.choice([-1.0, 1.0], n_groups)[groups]


def _size_at(power_law: PowerLawFit, flops: float) -> float:
    return power_law[0] * flops ** power_law[1]


def _flops(rows: Rows) -> Floats:
    return FLOPS_PER_PARAMETER_TOKEN * rows.n_params * rows.tokens


def _parabola_power_law(rows: Rows) -> PowerLawFit | str:
    parabolas = fit_parabolas(rows, _flops(rows))
    found, at = optimal_size_power_law(parabolas), [p.flops for p in parabolas if p.n_params is not None]
    if found is None:
        return "fewer than three budgets have runs of four sizes or more around the lowest loss"
    return (*found, (min(at), max(at)))


def _envelope_power_law(rows: Rows) -> PowerLawFit | str:
    """Fits N_opt = k C^a through the sizes that have the lowest interpolated loss, at budgets that several sizes cover."""
    curves, flops, bins = list[tuple[float, Floats, Floats]](), _flops(rows), size_bins(rows.n_params)
    for size in np.unique(bins):
        which = np.flatnonzero(bins == size)
        if len(np.unique(rows.tokens[which])) >= MIN_POINTS:
            order = which[np.argsort(flops[which])]
            curves.append((float(np.exp(np.log(rows.n_params[which]).mean())), np.log(flops[order]), np.log(rows.loss[order])))
    if len(curves) < MIN_CURVES:
        return f"only {len(curves)} sizes have runs of {MIN_POINTS} budgets or more; the envelope needs {MIN_CURVES}"
    points = [point for c in _shared_budgets(curves) if (point := _lowest(curves, c)) is not None]
    if len(points) < MIN_CURVES:
        return "too few budgets at which a size in the middle has the lowest loss"
    log_c, log_n = np.array(points).T
    exponent, offset = np.polyfit(log_c, log_n, 1)
    return float(np.exp(offset)), float(exponent), (float(np.exp(log_c.min())), float(np.exp(log_c.max())))


def _shared_budgets(curves: Sequence[tuple[float, Floats, Floats]]) -> Floats:
    lowest, highest = min(c[0] for _, c, _ in curves), max(c[-1] for _, c, _ in curves)
    return np.linspace(lowest, highest, 60)


def _lowest(curves: Sequence[tuple[float, Floats, Floats]], log_c: float) -> tuple[float, float] | None:
    """Returns (ln C, ln N) of the lowest curve; None if it is the smallest or largest of the sizes that reach ln C."""
    there = [(np.interp(log_c, c, loss), n) for n, c, loss in curves if c[0] <= log_c <= c[-1]]
    if len(there) < MIN_POINTS:
        return None
    best = int(np.argmin([loss for loss, _ in there]))
    return None if best in (0, len(there) - 1) else (float(log_c), float(np.log(there[best][1])))
