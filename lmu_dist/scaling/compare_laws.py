"""Compares laws on one table: rows in, every law with its diagnostics, misfit, criterion and errors on held-out runs out.

A law is supported if its optimum is certified, its form fits, and no other law describes the table better by more than chance.
Laws that are supported together are tied: the table cannot tell them apart.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lmu_dist.records import REPEATED
from lmu_dist.scaling.constraints import NONE, Constraints
from lmu_dist.scaling.diagnostics import FitDiagnostics, check_intervals, check_table, fit_and_diagnose
from lmu_dist.scaling.fit import Fit, refit
from lmu_dist.scaling.forms import FORMS, law_name
from lmu_dist.scaling.intervals import (
    N_RESAMPLES,
    Interval,
    parameter_intervals,
    resample,
    resampled_units,
    residual_scale,
    small_sample_correction,
)
from lmu_dist.scaling.laws import Chinchilla, ScalingLaw
from lmu_dist.scaling.misfit import Misfit, find_misfit
from lmu_dist.scaling.objective import huber, log_residuals
from lmu_dist.scaling.table import Rows
from lmu_dist.scaling.table_checks import check_rows

TIE = 6.0  # laws whose criterion is higher than the lowest by less are tied; as for Akaike's: a likelihood ratio of exp(3)
HELD_OUT_FACTORS = (1.5, 2.5, 4.0)  # runs above the largest N (or C = 6ND) divided by these are held out
HELD_OUT_SHARE = (0.02, 0.4)  # of the runs, at least and at most
ROUNDING_SCALE = 1e-14  # squared residuals below it are rounding errors
HELD_OUT_TOLERANCE, HELD_OUT_STEPS = 1e-2, 200  # of the refits, which start at the law of all runs
HELD_OUT_TIE = 1.3  # laws that all misfit are tied if their held-out errors are within this ratio


@dataclass(frozen=True)
class HeldOut:
    """Relative errors of predicting the largest runs from the others: `what` is N or C, held out above `above`."""

    what: str
    above: float
    n_rows: int
    median_error: float  # of the absolute errors
    mean_error: float


@dataclass(frozen=True)
class Candidate:
    """One law on the table. `criterion` is a robust Akaike criterion above the lowest one; None if the law was not fitted."""

    form: type[ScalingLaw]
    fit: Fit | None
    diagnostics: FitDiagnostics
    misfit: Misfit | None = None
    constraints: Constraints = NONE
    criterion: float | None = None
    held_out: tuple[HeldOut, ...] = ()
    supported: bool = False
    weight: float = 0.0  # in forecasts; sums to 1 over the supported laws

    @property
    def name(self) -> str:
        """The name of the law."""
        return law_name(self.form)

    @property
    def n_free(self) -> int:
        """The number of parameters that were fitted."""
        return self.constraints.n_free(self.form)

    @property
    def fits(self) -> bool:
        """Whether the optimum is certified and the form is that of the table."""
        return self.diagnostics.passed and self.misfit is not None and not self.misfit.reasons

    @property
    def held_out_error(self) -> float | None:
        """The median absolute error on held-out runs, averaged over the holdouts; None if there are none."""
        return float(np.mean([h.median_error for h in self.held_out])) if self.held_out else None


@dataclass(frozen=True)
class LawComparison:
    """All laws on one table. `chosen` is the simplest supported law; None if no law is certified, or rows must be corrected."""

    rows: Rows
    labels: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    warnings: tuple[str, ...]
    reasons: tuple[str, ...]  # why no law is chosen
    correction: float = 1.0

    @property
    def fits(self) -> bool:
        """Whether the form of a supported law fits; otherwise the supported laws only predict held-out runs best."""
        return any(c.fits for c in self.supported)

    @property
    def supported(self) -> list[Candidate]:
        """The laws that the table cannot tell apart, the simplest first."""
        return [c for c in self.candidates if c.supported] if self.chosen is not None else []


def forms_for(rows: Rows) -> list[type[ScalingLaw]]:
    """Returns the laws that can be fitted to a table: those of repeated data only if it has unique tokens, and only those."""
    repeats = rows.unique_tokens is not None and bool(np.any(rows.tokens > REPEATED * rows.unique_tokens))
    return [form for form in FORMS.values() if repeats == form.NEEDS_UNIQUE or (repeats and form is Chinchilla)]


def compare_laws(
    rows: Rows,
    forms: Sequence[type[ScalingLaw]] | None = None,
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    holdouts: bool = True,
    constraints: Constraints = NONE,
) -> LawComparison:
    """Fits every law and says which ones the table supports. `labels`, `names` and `constraints`: see `fit_and_validate`."""
    checks = check_rows(rows, names or [str(i + 1) for i in range(len(rows))], labels)
    candidates = [_candidate(form, rows, checks.labels, constraints) for form in forms or forms_for(rows)]
    candidates = _with_criteria(candidates, rows)
    if holdouts:
        candidates = _with_held_out(candidates, rows)
    candidates = sorted(_with_support(candidates), key=lambda c: (not c.supported, c.n_free))
    chosen = candidates[0] if candidates and candidates[0].supported and not checks.reasons else None
    reasons = list(checks.reasons)
    if not reasons and chosen is None:
        reasons = [f"{c.name}: {'; '.join(c.diagnostics.reasons)}" for c in candidates]
    correction = 1.0
    if chosen is not None and chosen.fit is not None:
        correction = small_sample_correction(chosen.fit, rows, checks.labels)
    return LawComparison(rows, checks.labels, tuple(candidates), chosen, checks.warnings, tuple(reasons), correction)


def _candidate(form: type[ScalingLaw], rows: Rows, labels: Sequence[str], constraints: Constraints) -> Candidate:
    if reasons := check_table(form, rows, constraints):
        return Candidate(form, None, FitDiagnostics(tuple(reasons)))
    fitted, diagnostics, constraints, _ = fit_and_diagnose(form, rows, constraints)
    return Candidate(form, fitted, diagnostics, find_misfit(fitted, rows, labels), constraints)


def _with_criteria(candidates: Sequence[Candidate], rows: Rows) -> list[Candidate]:
    """Adds the criterion: twice the objective in units of E[psi^2]/E[psi'] of the best law's residuals, plus two per parameter.

    Parameters are those that were fitted. For normal residuals and least squares it is Akaike's criterion with a known variance
    (Ronchetti 1985 has the robust one).
    """
    sums = {c.name: float(huber(log_residuals(c.fit.law, rows)).sum()) for c in candidates if c.fit is not None}
    sums = {name: value for name, value in sums.items() if np.isfinite(value)}
    if not sums:
        return list(candidates)
    best = next(c for c in candidates if c.name == min(sums, key=sums.__getitem__))
    assert best.fit is not None
    dof = max(len(rows) - best.fit.n_free, 1)
    scale = residual_scale(best.fit.law, rows) * len(rows) / dof + ROUNDING_SCALE
    criteria = {c.name: 2 * sums[c.name] / scale + 2 * c.n_free for c in candidates if c.name in sums}
    eligible = [criteria[c.name] for c in candidates if c.name in criteria and c.diagnostics.passed]
    lowest = min(eligible or criteria.values())
    return [replace(c, criterion=criteria[c.name] - lowest) if c.name in criteria else c for c in candidates]


def _with_support(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Marks the supported laws and gives them Akaike's weights."""
    certified = [c for c in candidates if c.diagnostics.passed and c.criterion is not None]
    fitting = [c for c in certified if c.misfit is not None and not c.misfit.reasons]
    if fitting:
        lowest = min(c.criterion for c in fitting if c.criterion is not None)
        names: Collection[str] = [c.name for c in fitting if c.criterion is not None and c.criterion - lowest < TIE]
    elif any(c.held_out for c in certified):  # no form fits: those that predict best
        errors = {c.name: c.held_out_error or np.inf for c in certified}
        names = [name for name, error in errors.items() if error <= HELD_OUT_TIE * min(errors.values())]
    else:
        names = [c.name for c in certified if c.criterion is not None and c.criterion < TIE]
    raw = {c.name: np.exp(-0.5 * (c.criterion or 0.0)) if fitting else 1.0 for c in candidates if c.name in names}
    total = sum(raw.values())
    return [
        replace(c, supported=c.name in names, weight=float(raw.get(c.name, 0.0) / total) if total else 0.0) for c in candidates
    ]


def held_out_masks(rows: Rows) -> list[tuple[str, float, NDArray[np.bool_]]]:
    """Returns the holdouts of a table: what is held out (N or C), above which value, and the mask of the rows."""
    masks = list[tuple[str, float, NDArray[np.bool_]]]()
    for what, values in (("N", rows.n_params), ("C", 6 * rows.n_params * rows.tokens)):
        for factor in HELD_OUT_FACTORS:
            above = float(values.max()) / factor
            held = values > above * 1.02  # sizes are met within 2 %
            share = float(held.mean())
            known = any(np.array_equal(held, other) for _, _, other in masks)
            if HELD_OUT_SHARE[0] <= share <= HELD_OUT_SHARE[1] and not known:
                masks.append((what, above, held))
    return masks


def _with_held_out(candidates: Sequence[Candidate], rows: Rows) -> list[Candidate]:
    found: dict[str, list[HeldOut]] = {c.name: [] for c in candidates}
    for what, above, held in held_out_masks(rows):
        kept, rest = rows.where(~held), rows.where(held)
        for candidate in candidates:
            if candidate.fit is None or check_table(candidate.form, kept, candidate.constraints):
                continue
            start = candidate.fit.law
            with np.errstate(all="ignore"):
                errors = np.expm1(
                    log_residuals(refit(start, kept, None, HELD_OUT_TOLERANCE, candidate.constraints, HELD_OUT_STEPS).law, rest)
                )
            errors = np.where(np.isfinite(errors), errors, 1.0)
            found[candidate.name].append(
                HeldOut(what, above, len(rest), float(np.median(np.abs(errors))), float(errors.mean()))
            )
    return [replace(c, held_out=tuple(found[c.name])) for c in candidates]


def law_intervals(comparison: LawComparison, n_resamples: int = N_RESAMPLES) -> dict[str, dict[str, Interval]]:
    """Returns the 90 % intervals of the parameters of the supported laws, by law and parameter.

    Laws that do not fit have none, nor have those with too few runs, with parameters that no run determines by itself
    (farseer), or with an interval that is too wide to mean anything.
    """
    found, rows, labels = dict[str, dict[str, Interval]](), comparison.rows, comparison.labels
    n_units = len(set(resampled_units(rows, labels)))
    for candidate in comparison.supported if comparison.fits else []:
        fit, held = candidate.fit, candidate.constraints.names() | {candidate.form.KINK}
        if fit is None or candidate.form.FLEXIBLE or n_units < 2 * fit.n_free:
            continue
        laws, correction = resample(fit, rows, labels, n_resamples), small_sample_correction(fit, rows, labels)
        intervals = {k: v for k, v in parameter_intervals(fit.law, laws, correction).items() if k not in held}
        if not check_intervals(intervals, candidate.form, held):
            found[candidate.name] = intervals
    return found
