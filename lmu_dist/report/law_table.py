"""Puts the comparison of laws into words for the page: a `LawComparison` in, a row per law and a sentence out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling.compare_laws import Candidate, LawComparison
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.misfit import SIGNIFICANCE, Misfit


@dataclass(frozen=True)
class LawRow:
    """What the page says of one law. Misses and errors are relative; errors are medians of absolute values on held-out runs.

    `supported` also means that its parameters are determined.
    """

    name: str
    formula: str
    verdict: str
    supported: bool
    fitted: bool
    typical_miss: float | None
    worst_miss: float | None
    p_value: float | None
    criterion: float | None
    error_of_sizes: float | None
    error_of_budgets: float | None
    weight: float


def law_rows(comparison: LawComparison) -> list[LawRow]:
    """Returns a row for every law, the supported ones first."""
    return [_row(candidate, comparison) for candidate in comparison.candidates]


def law_sentence(comparison: LawComparison) -> str:
    """Returns in one or two sentences which laws the runs support."""
    names = [candidate.name for candidate in comparison.supported]
    usual = next((candidate for candidate in comparison.candidates if candidate.form is Chinchilla), None)
    if usual is not None and usual.fit is None:
        return f"These runs cannot tell laws apart: {'; '.join(usual.diagnostics.reasons)}."
    if not names:
        return "The runs determine no law."
    if not comparison.fits:
        return f"No law that was fitted fits these runs. The least wrong one is {_listed(names)}."
    imprecise = [candidate.name for candidate in comparison.supported if candidate.imprecise]
    only, they = "", "it" if len(imprecise) == 1 else "them"
    if imprecise:
        only = f" The parameters of {_listed(imprecise)} are not determined; forecasts use {they} all the same."
    if len(names) == 1:
        return f"The runs support one law: {names[0]}.{only}"
    return f"The runs cannot tell {len(names)} laws apart: {_listed(names)}. A forecast averages them.{only}"


def misfit_sentence(misfit: Misfit, names: Sequence[str]) -> str:
    """Returns in words how well a law describes its runs. `names` has what to call each run."""
    worst = names[misfit.worst_rows[0]] if misfit.worst_rows else "-"
    misses = f"The law misses the losses by {misfit.typical_miss:.2%} at the median, and by {misfit.worst_miss:+.2%} at most"
    known = f" Seeds differ by {misfit.replicate_noise:.2%}." if misfit.replicate_noise is not None else ""
    if misfit.p_value is None:
        structure = "There are too few runs to test whether the misses vary with N and D."
    elif misfit.reasons:
        structure = f"The misses vary with N and D as noise does not ({p_text(misfit.p_value)}): this form is wrong here."
    else:
        below = " or too little to matter" if misfit.p_value < SIGNIFICANCE else ""
        structure = f"The misses vary with N and D no more than noise does{below} ({p_text(misfit.p_value)})."
    return f"{misses} (run {worst}).{known} {structure}"


def p_text(p_value: float | None) -> str:
    """Formats a probability, as in "p = 0.03"."""
    text = "-" if p_value is None else f"p = {p_value:.2g}" if p_value >= 1e-6 else "p < 1e-6"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _row(candidate: Candidate, comparison: LawComparison) -> LawRow:
    misfit = candidate.misfit if candidate.fit is not None else None
    return LawRow(
        name=candidate.name,
        formula=candidate.form.FORMULA,
        verdict=_verdict(candidate, comparison),
        supported=candidate.supported and candidate.determined and comparison.fits,
        fitted=misfit is not None and candidate.diagnostics.passed,
        typical_miss=misfit.typical_miss if misfit else None,
        worst_miss=misfit.worst_miss if misfit else None,
        p_value=misfit.p_value if misfit else None,
        criterion=candidate.criterion,
        error_of_sizes=_held_out(candidate, "N"),
        error_of_budgets=_held_out(candidate, "C"),
        weight=candidate.weight,
    )


def _held_out(candidate: Candidate, what: str) -> float | None:
    errors = [held.median_error for held in candidate.held_out if held.what == what]
    return float(np.mean(errors)) if errors else None


def _verdict(candidate: Candidate, comparison: LawComparison) -> str:
    if candidate.fit is None:
        return f"not fitted: {'; '.join(candidate.diagnostics.reasons)}"
    if not candidate.diagnostics.passed:
        return f"not determined: {'; '.join(candidate.diagnostics.reasons)}"
    others = [other.name for other in comparison.supported if other.name != candidate.name]
    if candidate.supported and comparison.fits:
        support = f"tied with {_listed(others)}" if others else "supported"
        imprecise = f"; predicts, but its parameters are not determined: {'; '.join(candidate.imprecise)}"
        return support + imprecise if candidate.imprecise else support
    if candidate.supported:
        compared = sum(bool(other.held_out) for other in comparison.candidates if other.diagnostics.passed)
        return "does not fit, but predicts held-out runs best" if compared > 1 else "does not fit"
    if candidate.misfit is not None and candidate.misfit.reasons:
        return "does not fit"
    return "another law describes the runs better"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
