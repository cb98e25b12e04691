"""Fits a law to a table and validates it: a table in, a `FitResult` with diagnostics, intervals, holdout and influence out.

`lmu-dist fit` and the report show this result. If the fit fails a check, the result has no law.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lmu_dist.scaling.diagnostics import FitDiagnostics, check_intervals, check_table, diagnose
from lmu_dist.scaling.fit import Fit, fit, n_parameters, refit, unitless_names
from lmu_dist.scaling.intervals import (
    N_RESAMPLES,
    Interval,
    bootstrap_weights,
    fit_resamples,
    parameter_intervals,
    profile_interval,
    small_sample_correction,
)
from lmu_dist.scaling.laws import ScalingLaw, parameters
from lmu_dist.scaling.table import Rows, size_bins

MAX_LEAVE_ONE_OUT = 400  # most refits for finding influential runs
FIRST_RESAMPLES = 100  # resamples after which a law with too wide intervals is given up
MAX_WEIGHTS = 2_000_000  # runs times resamples; a long table needs fewer resamples


@dataclass(frozen=True)
class Holdout:
    """Relative errors of predicting the largest size from a fit to the smaller ones; positive if the prediction is too high."""

    n_params: float
    n_rows: int
    mean_error: float | None
    worst_error: float | None
    reasons: tuple[str, ...]  # why there is no prediction


@dataclass(frozen=True)
class Influence:
    """The run whose removal changes a parameter most: its row index, and the value of the parameter without it."""

    row: int
    without: float


@dataclass(frozen=True)
class FitResult:
    """A fitted law with everything known about its quality.

    `law` is None if the fit failed a check; the other numbers then describe a fit that must not be used.
    """

    form: type[ScalingLaw]
    n_rows: int
    law: ScalingLaw | None
    objective: float | None
    diagnostics: FitDiagnostics
    intervals: dict[str, Interval] = field(default_factory=dict)
    profiles: dict[str, Interval | None] = field(default_factory=dict)
    holdout: Holdout | None = None
    influence: dict[str, Influence] = field(default_factory=dict)
    n_resamples: int = 0
    laws: tuple[ScalingLaw, ...] = ()  # of the resamples
    correction: float = 1.0  # small-sample correction: the factor by which the spread of the resamples is too small
    n_groups: int = 0  # number of groups of runs that were resampled; a group may be a single run


def fit_and_validate(
    form: type[ScalingLaw], rows: Rows, labels: Sequence[str] | None = None, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> FitResult:
    """Fits a law and validates it. Runs with the same label are resampled together; without labels every run separately."""
    if reasons := check_table(form, rows):
        return FitResult(form, len(rows), None, None, FitDiagnostics(tuple(reasons)))
    fitted = fit(form, rows)
    diagnostics = diagnose(fitted, rows)
    if not diagnostics.passed:
        return FitResult(form, len(rows), None, fitted.objective, diagnostics)
    labels = labels or rows.duplicate_groups()
    n_groups = len(set(labels))
    correction = small_sample_correction(fitted, rows, n_groups)
    laws = list[ScalingLaw]()
    if n_groups >= 2 * n_parameters(form):  # the law meets fewer exactly for any weights, and intervals would be too narrow
        weights = bootstrap_weights(labels, min(n_resamples, max(200, MAX_WEIGHTS // len(rows))), seed)
        laws = fit_resamples(fitted, rows, weights[:FIRST_RESAMPLES])
        if not check_intervals(parameter_intervals(fitted.law, laws, correction), form):
            laws += fit_resamples(fitted, rows, weights[FIRST_RESAMPLES:])
    profiles = {name: profile_interval(fitted, rows, name) for name in unitless_names(form)}
    intervals = parameter_intervals(fitted.law, laws, correction) if laws else {}
    missing = [f"too few resamples determine {name}" for name in parameters(fitted.law) if laws and name not in intervals]
    known = intervals if laws else {name: profiles[name] or (0.0, np.inf) for name in form.EXPONENTS}
    diagnostics = replace(diagnostics, reasons=tuple(missing + check_intervals(known, form)))
    return FitResult(
        form=form,
        n_rows=len(rows),
        law=fitted.law if diagnostics.passed else None,
        objective=fitted.objective,
        diagnostics=diagnostics,
        intervals=intervals,
        profiles=profiles if diagnostics.passed else {},
        holdout=holdout(form, rows),
        influence=influence(fitted, rows) if diagnostics.passed else {},
        n_resamples=len(laws),
        laws=tuple(laws),
        correction=correction,
        n_groups=n_groups,
    )


def holdout(form: type[ScalingLaw], rows: Rows) -> Holdout:
    """Fits the runs without the largest size bin of N and returns the errors of predicting it."""
    sizes = size_bins(rows.n_params)
    largest = float(sizes.max())
    kept, held = rows.where(sizes < largest), rows.where(sizes == largest)
    if reasons := check_table(form, kept):
        return Holdout(largest, len(held), None, None, tuple(reasons))
    fitted = fit(form, kept)
    diagnostics = diagnose(fitted, kept)
    if not diagnostics.passed:
        return Holdout(largest, len(held), None, None, diagnostics.reasons)
    errors = fitted.law.loss(held.n_params, held.tokens) / held.loss - 1
    return Holdout(largest, len(held), float(errors.mean()), float(errors[np.abs(errors).argmax()]), ())


def influence(fitted: Fit, rows: Rows) -> dict[str, Influence]:
    """Finds, for E and every exponent, the run whose removal changes it most.

    In long tables only the runs with the largest residuals are tried.
    """
    form = type(fitted.law)
    tried = np.argsort(-np.abs(np.log(fitted.law.loss(rows.n_params, rows.tokens) / rows.loss)))[:MAX_LEAVE_ONE_OUT]
    strongest = dict[str, Influence]()
    for row in tried:
        without = parameters(refit(fitted.law, rows.where(np.arange(len(rows)) != row), tolerance=1e-4).law)
        for name in unitless_names(form):
            value = getattr(fitted.law, name)
            if name not in strongest or abs(without[name] - value) > abs(strongest[name].without - value):
                strongest[name] = Influence(int(row), without[name])
    return strongest
