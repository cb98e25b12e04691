"""Fits a law to a table and validates it: a table in, a `FitResult` with diagnostics, intervals, holdout and influence out.

`lmu-dist fit` and the report show this result. If the fit fails a check, the result has no law.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lmu_dist.scaling.constraints import NONE, Constraints
from lmu_dist.scaling.diagnostics import FitDiagnostics, check_table, diagnose, fit_and_diagnose
from lmu_dist.scaling.fit import Fit, fit
from lmu_dist.scaling.intervals import N_RESAMPLES, Interval, profile_interval
from lmu_dist.scaling.laws import ScalingLaw, parameters, unitless_names
from lmu_dist.scaling.minimise import minimise
from lmu_dist.scaling.misfit import Misfit, find_misfit, outlier_warnings
from lmu_dist.scaling.objective import Objective, log_residuals, losses
from lmu_dist.scaling.precision import find_precision
from lmu_dist.scaling.table import Rows, size_bins
from lmu_dist.scaling.table_checks import check_rows

MAX_LEAVE_ONE_OUT = 400  # most refits for finding influential runs
MAX_RESTARTS = 5  # fits that start again from a law that a profile found


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
    misfit: Misfit | None = None
    warnings: tuple[str, ...] = ()  # what is odd about the rows, although they can be fitted


def fit_and_validate(
    form: type[ScalingLaw],
    rows: Rows,
    labels: Sequence[str] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    names: Sequence[str] | None = None,
    constraints: Constraints = NONE,
) -> FitResult:
    """Fits a law and validates it. Runs with the same label share a part of their noise; without labels none do.

    `names` has what messages call each row, by default its number.
    """
    names = names or [str(i + 1) for i in range(len(rows))]
    checks = check_rows(rows, names, labels)
    if reasons := check_table(form, rows, constraints):
        return FitResult(form, len(rows), None, None, FitDiagnostics((*reasons, *checks.reasons)), warnings=checks.warnings)
    fitted, diagnostics, profiles, constraints, notes = fit_and_profile(form, rows, constraints)
    misfit = find_misfit(fitted, rows, checks.labels)
    diagnostics = replace(diagnostics, reasons=(*diagnostics.reasons, *misfit.reasons, *checks.reasons))
    result = FitResult(
        form=form,
        n_rows=len(rows),
        law=None,
        objective=fitted.objective,
        diagnostics=diagnostics,
        misfit=misfit,
        warnings=(*checks.warnings, *notes, *outlier_warnings(misfit, names)),
    )
    if not diagnostics.passed:
        return result
    precision = find_precision(fitted, rows, checks.labels, n_resamples, seed, profiles)
    diagnostics = replace(diagnostics, reasons=precision.reasons)
    return replace(
        result,
        law=fitted.law if diagnostics.passed else None,
        diagnostics=diagnostics,
        intervals=precision.intervals,
        # A profile keeps the kink where the fit has it, so it would be too narrow.
        profiles=profiles if diagnostics.passed and (not form.KINK or form.KINK in constraints.names()) else {},
        holdout=holdout(form, rows, constraints),
        influence=influence(fitted, rows) if diagnostics.passed else {},
        n_resamples=len(precision.laws),
        laws=precision.laws,
        correction=precision.correction,
        n_groups=precision.n_groups,
    )


def fit_and_profile(
    form: type[ScalingLaw], rows: Rows, constraints: Constraints
) -> tuple[Fit, FitDiagnostics, dict[str, Interval | None], Constraints, list[str]]:
    """Returns the fit, its diagnostics, if they pass the profile intervals of the parameters without units, and notes.

    If a refit of a profile finds a lower objective, the fit starts again from there: so no optimum that was seen is lower than
    that of the fit.
    """
    fitted, diagnostics, constraints, notes = fit_and_diagnose(form, rows, constraints)
    better = list[ScalingLaw]()
    for _ in range(MAX_RESTARTS):
        profiles = dict[str, Interval | None]()
        if not diagnostics.passed:
            break
        for name in unitless_names(form):
            if name in constraints.names() or name == form.KINK:
                continue
            profiles[name], lower = profile_interval(fitted, rows, name)
            if lower is not None:
                better.append(lower)
                break
        else:
            return fitted, diagnostics, profiles, constraints, notes
        fitted, diagnostics, constraints, notes = fit_and_diagnose(form, rows, constraints, better)
    return fitted, diagnostics, {}, constraints, notes


def holdout(form: type[ScalingLaw], rows: Rows, constraints: Constraints = NONE) -> Holdout:
    """Fits the runs without the largest size bin of N, under the same constraints, and returns the errors of predicting it."""
    sizes = size_bins(rows.n_params)
    largest = float(sizes.max())
    kept, held = rows.where(sizes < largest), rows.where(sizes == largest)
    if reasons := check_table(form, kept, constraints):
        return Holdout(largest, len(held), None, None, tuple(reasons))
    fitted = fit(form, kept, constraints)
    diagnostics = diagnose(fitted, kept)
    if not diagnostics.passed:
        return Holdout(largest, len(held), None, None, diagnostics.reasons)
    errors = losses(fitted.law, held) / held.loss - 1
    return Holdout(largest, len(held), float(errors.mean()), float(errors[np.abs(errors).argmax()]), ())


def influence(fitted: Fit, rows: Rows) -> dict[str, Influence]:
    """Finds, for E and every exponent, the run whose removal changes it most.

    In long tables only the runs with the largest residuals are tried. Parameters that are held, or searched on a grid, stay.
    """
    form, constraints = type(fitted.law), fitted.constraints
    tried = np.argsort(-np.abs(log_residuals(fitted.law, rows)))[:MAX_LEAVE_ONE_OUT]
    weights = np.ones((len(tried), len(rows)))
    weights[np.arange(len(tried)), tried] = 0
    objective = Objective(form, rows)
    starts = np.repeat(objective.vector(fitted.law)[None], len(tried), axis=0)
    optima = minimise(objective, starts, weights, constraints.basis(form), tolerance=1e-4, far=0)
    strongest = dict[str, Influence]()
    for row, vector in zip(tried.tolist(), optima.vectors, strict=True):
        without = parameters(objective.law(vector))
        for name in unitless_names(form):
            if name in constraints.names() or name == form.KINK:
                continue
            value = getattr(fitted.law, name)
            if name not in strongest or abs(without[name] - value) > abs(strongest[name].without - value):
                strongest[name] = Influence(row, without[name])
    return strongest
