"""How precisely a table determines the parameters of a law: a fit and its rows in, `Precision` out, with the resampled laws.

`validate` asks it for a single law, and `compare_laws` for every law that a table supports: so both say the same of a law.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling.diagnostics import MAX_INTERVAL_RATIO, check_intervals
from lmu_dist.scaling.fit import Fit
from lmu_dist.scaling.intervals import (
    N_RESAMPLES,
    Interval,
    parameter_intervals,
    profile_interval,
    resample,
    resampled_units,
    small_sample_correction,
)
from lmu_dist.scaling.laws import ScalingLaw, parameters
from lmu_dist.scaling.table import Rows

FIRST_RESAMPLES = 100  # resamples after which a law with too wide intervals is given up
NEAR_LIMIT = 0.5  # share of MAX_INTERVAL_RATIO from which FIRST_RESAMPLES are too few to decide
MAX_WEIGHTS = 2_000_000  # runs times resamples; a long table needs fewer resamples


@dataclass(frozen=True)
class Precision:
    """The 90 % intervals of a law's parameters, and in `reasons` which of them are known too imprecisely; empty if none.

    `laws` are those of the resamples, none if the groups of runs are too few for a bootstrap. `correction` is the factor by
    which their spread is too small, `n_groups` the number of groups of runs that were resampled; a group may be a single run.
    """

    laws: tuple[ScalingLaw, ...]
    correction: float
    n_groups: int
    intervals: dict[str, Interval]
    reasons: tuple[str, ...]


def find_precision(
    fit: Fit,
    rows: Rows,
    labels: Sequence[str],
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    profiles: Mapping[str, Interval | None] | None = None,
) -> Precision:
    """Returns how precisely rows, of which those with the same label share noise, determine the parameters of a fit.

    Where the groups are too few for a bootstrap, the profile intervals of the exponents are checked in its place: `profiles`,
    or, without them, those of the fit.
    """
    form, held = type(fit.law), fit.constraints.names() | {type(fit.law).KINK}
    n_groups, correction = len(set(resampled_units(rows, labels))), small_sample_correction(fit, rows, labels)
    laws, intervals = list[ScalingLaw](), dict[str, Interval]()
    if n_groups >= 2 * fit.n_free:  # the law meets fewer exactly for any weights, and intervals would be too narrow
        n_resamples = min(n_resamples, max(200, MAX_WEIGHTS // len(rows)))
        laws = resample(fit, rows, labels, min(FIRST_RESAMPLES, n_resamples), seed)
        if not check_intervals(parameter_intervals(fit.law, laws, correction), form, held):
            laws += resample(fit, rows, labels, n_resamples, seed, FIRST_RESAMPLES)
        found = parameter_intervals(fit.law, laws, correction)
        intervals = {name: interval for name, interval in found.items() if name not in held}
    needed = [] if form.FLEXIBLE else [name for name in parameters(fit.law) if name not in held]
    missing = [f"too few resamples determine {name}" for name in needed if laws and name not in intervals]
    known: dict[str, Interval] = intervals
    if not laws:
        exponents = [name for name in form.EXPONENTS if name not in held]
        known = {name: _profile(fit, rows, name, profiles) or (0.0, np.inf) for name in exponents}
    return Precision(tuple(laws), correction, n_groups, intervals, tuple(missing + check_intervals(known, form, held)))


def why_imprecise(fit: Fit, rows: Rows, labels: Sequence[str], n_resamples: int = N_RESAMPLES) -> tuple[str, ...]:
    """Returns the `reasons` of `find_precision`, from FIRST_RESAMPLES resamples where these decide; none for a flexible law."""
    if fit.law.FLEXIBLE:
        return ()
    first = find_precision(fit, rows, labels, min(n_resamples, FIRST_RESAMPLES))
    held = fit.constraints.names() | {fit.law.KINK}
    near = check_intervals(first.intervals, type(fit.law), held, NEAR_LIMIT * MAX_INTERVAL_RATIO)
    if first.reasons or not near or n_resamples <= FIRST_RESAMPLES:
        return first.reasons
    return find_precision(fit, rows, labels, n_resamples).reasons


def _profile(fit: Fit, rows: Rows, name: str, profiles: Mapping[str, Interval | None] | None) -> Interval | None:
    return profile_interval(fit, rows, name)[0] if profiles is None else profiles.get(name)
