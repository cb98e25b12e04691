"""The certificate of a fit: whether its numbers may be shown at all. A fit in, sentences out that speak against it.

No certificate, no number: a law without one is "not determined", for the reasons given here.
"""

from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling.fit import Fit, n_parameters, unitless
from lmu_dist.scaling.laws import Floats, Law, parameters
from lmu_dist.scaling.table import Rows, rungs

STEEPEST_GRADIENT = 1e-5  # of what the rows pull in either direction
AGREEMENT = 1e-6  # relative difference of the objectives of two starts that found one optimum
NEAR_TIE, SAME_LAW = 1e-3, 0.1  # objectives so near must be of laws whose exponents are as near; both relative
WORST_CONDITION = 1e3
WHOLE_LEVERAGE = 0.98
EXPONENTS = (0.01, 3.0)  # beyond, a term is a constant or a step
LEAST_FLOOR = 1e-3  # of the least loss: a floor below is none
EXACT = 1e-7  # ln nats: residuals so small are rounding, whose gradient points anywhere
WIDEST = 5.0  # ratio of the ends of an exponent's or a floor's interval; of public tables it is 2.1 at most


@dataclass(frozen=True)
class Certificate:
    """What was looked at; `reasons` is empty where all is well."""

    reasons: tuple[str, ...]
    n_starts: int = 0
    n_agreeing: int = 0
    gradient: float | None = None
    condition: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the law may be shown."""
        return not self.reasons


def unfit(form: type[Law], rows: Rows) -> list[str]:
    """Why a table cannot determine a law, whatever the fit says."""
    size, reasons = n_parameters(form), list[str]()
    if (distinct := len(set(rows.copies()))) < size + form.SPARE:
        reasons.append(f"{distinct} runs; a law of {size} parameters needs at least {size + form.SPARE}")
    fewest = 3 if form.HAS_FLOOR else 2
    for values, name in ((rows.n_params, "N"), (rows.tokens, "D")):
        if (n := len(set(rungs(values)))) < fewest:
            reasons.append(f"{name} takes {n} value{'s' * (n > 1)}; the law needs at least {fewest} that differ by 5 % or more")
    if len(rows) and np.ptp(np.log(rows.loss)) < EXACT:
        reasons.append("the loss is the same in all runs")
    return reasons


def certify(fit: Fit, rows: Rows) -> Certificate:
    """Looks at a fit; see the constants above for what is asked."""
    exact = len(rows) * EXACT**2
    agreeing = sum(reached <= fit.minimised * (1 + AGREEMENT) + exact for reached, _ in fit.reached)
    reasons = _bounds(fit.law, rows.loss) or _doubts(fit, agreeing, exact)  # at a bound the other doubts are its consequence
    return Certificate(tuple(reasons), len(fit.reached), agreeing, fit.gradient, fit.condition)


def _doubts(fit: Fit, agreeing: int, exact: float) -> list[str]:
    reasons = list[str]()
    if agreeing < 2:
        reasons.append(f"only one of {len(fit.reached)} starts came to the best objective: there may be a better one")
    here = unitless(fit.law)
    ties = [other for reached, other in fit.reached if reached <= fit.minimised * (1 + NEAR_TIE) + exact]
    if any(np.any(np.abs(other - here) > SAME_LAW * np.abs(here)) for other in ties):
        reasons.append("two different laws fit equally well: sizes and tokens vary together")
    if not fit.gradient <= STEEPEST_GRADIENT and fit.minimised > exact:
        reasons.append(f"the optimiser stopped before the minimum (gradient {fit.gradient:.1g} of what the runs pull)")
    if not fit.condition <= WORST_CONDITION:
        told = f"parameters cannot be told apart (condition number {fit.condition:.2g})"
        reasons.append(f"{told}: sizes and tokens vary little, or together")
    if fit.law.SPARE > 1 and (alone := int(np.sum(fit.leverage > WHOLE_LEVERAGE))):
        some = "1 run alone fixes a parameter" if alone == 1 else f"{alone} runs fix a parameter each, alone"
        reasons.append(f"{some}: nothing says how far off it is")
    return reasons


def too_wide(intervals: dict[str, tuple[float, float]], form: type[Law]) -> list[str]:
    """Exponents, and floors, that could be about anything. Prefactors go with them and are not asked."""
    return [
        f"{name} lies anywhere between {low:.2g} and {high:.2g} (90 %)"
        for name, (low, high) in intervals.items()
        if name in (*form.EXPONENTS, "E") and max(abs(low), abs(high)) > WIDEST * min(abs(low), abs(high))
    ]


def _bounds(law: Law, loss: Floats) -> list[str]:
    values, reasons = parameters(law), list[str]()
    for name in law.EXPONENTS:
        steepness = -values[name] if name == "eta" else values[name]
        if steepness < 0:
            reasons.append(f"{name} is {values[name]:.2g}: the loss rises with {'D' if name in ('beta', 'alpha_D') else 'N'}")
        elif not EXPONENTS[0] <= steepness <= EXPONENTS[1]:
            reasons.append(f"{name} ran to {values[name]:.2g}, outside {EXPONENTS[0]:g} .. {EXPONENTS[1]:g}")
    if law.HAS_FLOOR and not values["E"] >= LEAST_FLOOR * float(loss.min()):
        reasons.append(f"the irreducible loss E ran to zero ({values['E']:.1g}): the runs are too far from it to show it")
    return reasons
