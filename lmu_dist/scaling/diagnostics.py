"""Checks whether a fitted law is trustworthy: a fit and its table in, `FitDiagnostics` out, with a reason per failed check.

A law whose fit fails a check is "not determined": no command and no page shows its numbers, only the reasons.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmu_dist.scaling.constraints import NONE, Constraints
from lmu_dist.scaling.fit import Fit, fit, unitless_values
from lmu_dist.scaling.laws import Floats, ScalingLaw, parameters
from lmu_dist.scaling.table import Rows, size_bins

MAX_GRADIENT = 1e-5  # largest gradient at the optimum, relative to the sum of the rows' absolute contributions to it
SAME_OBJECTIVE = 1e-6  # two starts whose objectives differ by less (relative) found the same optimum
NEAR_TIE, SAME_LAW = 1e-3, 0.1  # fits whose objectives differ by less than the first must agree to the second; both relative
MAX_CONDITION = 1e3
MAX_LEVERAGE = 0.98
EXPONENTS = (0.01, 3.0)  # allowed range; outside of it a term is a constant or a step
MIN_FLOOR = 1e-3  # smallest irreducible loss E, relative to the lowest loss in the table
ROUNDING = 1e-7  # in ln L: smaller residuals are rounding errors, and their gradient means nothing
MAX_INTERVAL_RATIO = 5.0  # upper over lower end of the interval of an exponent or of E; at most 2.1 for the public tables


@dataclass(frozen=True)
class FitDiagnostics:
    """The results of the checks; `reasons` has a sentence for every failed one, and is empty if all passed."""

    reasons: tuple[str, ...]
    n_starts: int = 0
    n_agreeing: int = 0
    gradient: float | None = None
    condition: float | None = None

    @property
    def passed(self) -> bool:
        """Whether all checks passed, so that the law may be shown."""
        return not self.reasons


def check_table(form: type[ScalingLaw], rows: Rows, constraints: Constraints = NONE) -> list[str]:
    """Returns the reasons why a table cannot determine a law, independent of any fit; empty if it can."""
    size, reasons = constraints.n_free(form), list[str]()
    if (distinct := len(set(rows.duplicate_groups()))) < size + form.MIN_EXTRA_RUNS:
        law = f"a law with {size} {'' if constraints == NONE else 'free '}parameters"
        reasons.append(f"only {distinct} distinct runs, but {law} needs {size + form.MIN_EXTRA_RUNS}")
    fewest = 3 if form.HAS_FLOOR else 2
    for values, name in ((rows.n_params, "N"), (rows.tokens, "D")):
        if (n := len(set(size_bins(values)))) < fewest:
            values_found = f"only {n} distinct value{'s' * (n > 1)} of {name}"
            reasons.append(f"{values_found}, but the law needs {fewest} that differ by 5 % or more")
    if len(rows) and np.ptp(np.log(rows.loss)) < ROUNDING:
        reasons.append("the loss is the same in all runs")
    return reasons


def diagnose(fitted: Fit, rows: Rows) -> FitDiagnostics:
    """Checks a fit against the limits above and returns the diagnostics."""
    rounding = len(rows) * ROUNDING**2
    agreeing = sum(value <= fitted.minimised_objective * (1 + SAME_OBJECTIVE) + rounding for value, _ in fitted.start_optima)
    # A parameter at its bound makes the other checks fail too, so only the bound is reported.
    reasons = _check_bounds(fitted.law, rows.loss) or _check_optimum(fitted, agreeing, rounding)
    return FitDiagnostics(tuple(reasons), len(fitted.start_optima), agreeing, fitted.gradient, fitted.condition)


def fit_and_diagnose(
    form: type[ScalingLaw], rows: Rows, constraints: Constraints = NONE, extra_starts: Sequence[ScalingLaw] = ()
) -> tuple[Fit, FitDiagnostics, Constraints, list[str]]:
    """Fits and checks a law; returns the fit, its diagnostics, the constraints used, and notes about them.

    If the fit fails, parameters that have a published value are held at it, and a note says so.
    """
    fitted = fit(form, rows, constraints, extra_starts)
    diagnostics = diagnose(fitted, rows)
    published = {name: value for name, value in form.DEFAULTS.items() if name not in constraints.names()}
    if diagnostics.passed or not published:
        return fitted, diagnostics, constraints, []
    held = replace(constraints, held={**constraints.held, **published})
    other = fit(form, rows, held, extra_starts)
    if not (checked := diagnose(other, rows)).passed:
        return fitted, diagnostics, constraints, []
    names = ", ".join(f"{name} = {value:.4g}" for name, value in published.items())
    return other, checked, held, [f"the table does not determine all parameters: held at the published {names}"]


def _check_optimum(fitted: Fit, agreeing: int, rounding: float) -> list[str]:
    reasons = list[str]()
    if agreeing < 2:
        reasons.append(f"only one of {len(fitted.start_optima)} starts reached the lowest objective, so a better one may exist")
    here = unitless_values(fitted.law)
    ties = [other for value, other in fitted.start_optima if value <= fitted.minimised_objective * (1 + NEAR_TIE) + rounding]
    if any(np.any(np.abs(other - here) > SAME_LAW * np.abs(here)) for other in ties):
        reasons.append("two different laws fit equally well, because N and D vary together")
    if not fitted.gradient <= MAX_GRADIENT and fitted.minimised_objective > rounding:
        reasons.append(f"the optimiser stopped before the minimum (relative gradient {fitted.gradient:.1g})")
    if not fitted.condition <= MAX_CONDITION:
        inseparable = f"the parameters cannot be separated (condition number {fitted.condition:.2g})"
        reasons.append(f"{inseparable}: N and D vary too little, or together")
    if fitted.law.MIN_EXTRA_RUNS > 1 and (n := int(np.sum(fitted.leverage > MAX_LEVERAGE))):
        decisive = "a single run determines a parameter" if n == 1 else f"{n} runs each determine a parameter by themselves"
        reasons.append(f"{decisive}, whose error is therefore unknown")
    return reasons


def check_intervals(
    intervals: dict[str, tuple[float, float]],
    form: type[ScalingLaw],
    held: Collection[str] = (),
    max_ratio: float = MAX_INTERVAL_RATIO,
) -> list[str]:
    """Returns a reason for every exponent, and E, whose interval is too wide: its ends have a ratio above `max_ratio`.

    Prefactors follow these and are not checked.
    """
    return [
        f"{name} is known too imprecisely: its 90 % interval is {low:.2g} to {high:.2g}"
        for name, (low, high) in intervals.items()
        if name in (*form.EXPONENTS, "E")
        and name not in held
        and max(abs(low), abs(high)) > max_ratio * min(abs(low), abs(high))
    ]


def _check_bounds(law: ScalingLaw, loss: Floats) -> list[str]:
    values, reasons = parameters(law), list[str]()
    for name in law.EXPONENTS:
        steepness = -values[name] if name == "eta" else values[name]
        if steepness < -ROUNDING:
            reasons.append(
                f"{name} is {values[name]:.2g}: the fitted loss rises with {'D' if name in ('beta', 'alpha_D') else 'N'}"
            )
        elif not EXPONENTS[0] <= steepness <= EXPONENTS[1]:
            reasons.append(f"{name} went to {values[name]:.2g}, outside the allowed range {EXPONENTS[0]:g} to {EXPONENTS[1]:g}")
    if law.HAS_FLOOR and not values["E"] >= MIN_FLOOR * float(loss.min()):
        reasons.append(
            f"the irreducible loss E went to zero ({values['E']:.1g}): the losses are too far above it to determine it"
        )
    return reasons
