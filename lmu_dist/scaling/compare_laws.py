"""Compares laws on one table: rows in, every law with its diagnostics, misfit, criterion and errors on held-out runs out.

A law is supported if its optimum is certified, its form fits, and no other law describes the table better by more than chance.
Laws that are supported together are tied: the table cannot distinguish them. A supported law predicts, but its parameters may
have too wide intervals: then they are not determined, as in a fit of this law alone.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lmu_dist.records import REPEATED
from lmu_dist.scaling.constraints import NONE, Constraints
from lmu_dist.scaling.diagnostics import FitDiagnostics, check_table, fit_and_diagnose
from lmu_dist.scaling.fit import Fit, fit_parts, refit
from lmu_dist.scaling.forms import FORMS, law_name
from lmu_dist.scaling.intervals import N_RESAMPLES, Interval, huber_scale, small_sample_correction
from lmu_dist.scaling.laws import Chinchilla, Floats, ScalingLaw
from lmu_dist.scaling.misfit import Misfit, find_misfit
from lmu_dist.scaling.objective import huber, log_residuals
from lmu_dist.scaling.precision import find_precision, why_imprecise
from lmu_dist.scaling.table import Rows
from lmu_dist.scaling.table_checks import check_rows

TIE = 6.0  # laws whose criterion is higher than the lowest by less are tied; as for Akaike's: a likelihood ratio of exp(3)
HELD_OUT_FACTORS = (1.5, 2.5, 4.0)  # runs above the largest N (or C = 6ND) divided by these are held out
HELD_OUT_SHARE = (0.02, 0.4)  # of the runs, at least and at most
ROUNDING_SCALE = 1e-14  # squared residuals below it are rounding errors
HELD_OUT_TOLERANCE, HELD_OUT_STEPS = 1e-2, 60  # of the fits without held-out runs, whose predictions need not be exact
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
    imprecise: tuple[str, ...] = ()  # of a supported law that fits: the parameters that are known too imprecisely, as sentences

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
    def determined(self) -> bool:
        """Whether the law fits and, if it is supported, its parameters are known precisely enough to be shown."""
        return self.fits and not self.imprecise

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the law is not determined: failed checks, a misfit, and parameters that are known too imprecisely."""
        return (*self.diagnostics.reasons, *(self.misfit.reasons if self.misfit else ()), *self.imprecise)

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
    def determined(self) -> bool:
        """Whether the parameters of the chosen law may be shown; otherwise it only predicts, or there is none."""
        return self.chosen is not None and self.chosen.determined

    @property
    def supported(self) -> list[Candidate]:
        """The laws that the table cannot tell apart, the simplest first."""
        return [c for c in self.candidates if c.supported] if self.chosen is not None else []


def repeats_data(rows: Rows) -> bool:
    """Returns whether a run of a table is known to train on more tokens than its data have."""
    return rows.unique_tokens is not None and bool(np.any(rows.tokens > REPEATED * rows.unique_tokens))


def forms_for(rows: Rows) -> list[type[ScalingLaw]]:
    """Returns the laws that can be fitted to a table: those of repeated data only if it has unique tokens, and only those."""
    repeats = repeats_data(rows)
    return [form for form in FORMS.values() if repeats == form.NEEDS_UNIQUE or (repeats and form is Chinchilla)]


def compare_laws(
    rows: Rows,
    forms: Sequence[type[ScalingLaw]] | None = None,
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    holdouts: bool = True,
    constraints: Constraints = NONE,
    n_resamples: int = N_RESAMPLES,
) -> LawComparison:
    """Fits every law and says which ones the table supports. `labels`, `names` and `constraints`: see `fit_and_validate`.

    `n_resamples` is the most resamples from which it is found whether the parameters of a supported law are determined.
    """
    checks = check_rows(rows, names or [str(i + 1) for i in range(len(rows))], labels)
    candidates = [_candidate(form, rows, checks.labels, constraints) for form in forms or forms_for(rows)]
    candidates = _with_criteria(candidates, rows)
    if holdouts:
        candidates = _with_held_out(candidates, rows)
    candidates = [
        replace(c, imprecise=why_imprecise(c.fit, rows, checks.labels, n_resamples)) if c.fit and c.supported and c.fits else c
        for c in sorted(_with_support(candidates), key=lambda c: (not c.supported, c.n_free))
    ]
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
    """Adds the criterion: twice the Huber sum in units of E[psi^2]/E[psi'] of one law's residuals, plus two per parameter.

    Parameters are those that were fitted. For normal residuals and least squares it is Akaike's criterion with a known variance
    (Ronchetti 1985 has the robust one).
    """
    residuals = {c.name: _huber_residuals(c, rows) for c in candidates if c.fit is not None}
    sums = {name: float(huber(found).sum()) for name, found in residuals.items()}
    known = [c for c in candidates if np.isfinite(sums.get(c.name, np.inf))]
    if not known:
        return list(candidates)
    # The scale is that of the simplest law that fits. Noise beyond DELTA makes a fit one of least absolute deviations, which
    # meets about as many runs exactly as it has parameters: of few runs the residuals of a law with many parameters then say
    # too little of the noise, by a factor of up to three (LOG.md), and a law that fits would exclude the true one by chance.
    of_scale = min(known, key=lambda c: (not c.fits, not c.diagnostics.passed, c.n_free if c.fits else 0, sums[c.name]))
    dof = max(len(rows) - of_scale.n_free, 1)
    scale = huber_scale(residuals[of_scale.name]) * len(rows) / dof + ROUNDING_SCALE
    criteria = {c.name: 2 * sums[c.name] / scale + 2 * c.n_free for c in known}
    lowest = min([criteria[c.name] for c in known if c.diagnostics.passed] or criteria.values())
    return [replace(c, criterion=criteria[c.name] - lowest) if c.name in criteria else c for c in candidates]


def _huber_residuals(candidate: Candidate, rows: Rows) -> Floats:
    """Returns the residuals of ln L where a law's own Huber sum is lowest, also of a law that is fitted by least squares.

    At the optimum of another objective the sum would be higher, so that a single outlier could exclude the law.
    """
    assert candidate.fit is not None
    law = candidate.fit.law
    with np.errstate(all="ignore"):  # a law at its bounds may have infinite losses
        if law.LEAST_SQUARES:
            law = refit(law, rows, constraints=candidate.constraints, always_huber=True).law
        return log_residuals(law, rows)


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
    """Adds the errors on held-out runs of every law, fitted to the others from their own starts.

    A descent from the law of all runs would end in a valley that the held-out runs have chosen.
    """
    masks = held_out_masks(rows)
    found = list[Candidate]()
    for c in candidates:
        possible = [m for m in masks if c.fit is not None and not check_table(c.form, rows.where(~m[2]), c.constraints)]
        kept = [~held for _, _, held in possible]
        laws = fit_parts(c.form, rows, kept, c.constraints, HELD_OUT_TOLERANCE, HELD_OUT_STEPS) if kept else []
        found.append(
            replace(c, held_out=tuple(_held_out(law, rows, *holdout) for law, holdout in zip(laws, possible, strict=True)))
        )
    return found


def _held_out(law: ScalingLaw, rows: Rows, what: str, above: float, held: NDArray[np.bool_]) -> HeldOut:
    with np.errstate(all="ignore"):
        errors = np.expm1(log_residuals(law, rows.where(held)))
    errors = np.where(np.isfinite(errors), errors, 1.0)
    return HeldOut(what, above, len(errors), float(np.median(np.abs(errors))), float(errors.mean()))


def law_intervals(comparison: LawComparison, n_resamples: int = N_RESAMPLES) -> dict[str, dict[str, Interval]]:
    """Returns the 90 % intervals of the parameters of the supported laws, by law and parameter.

    Laws that do not fit have none, nor have those with too few runs, with parameters that no run determines by itself
    (farseer), or with an interval that is too wide to mean anything.
    """
    found = dict[str, dict[str, Interval]]()
    for candidate in comparison.supported if comparison.fits else []:
        if candidate.fit is None or candidate.form.FLEXIBLE or candidate.imprecise:
            continue
        precision = find_precision(candidate.fit, comparison.rows, comparison.labels, n_resamples)
        if precision.laws and not precision.reasons:
            found[candidate.name] = precision.intervals
    return found
