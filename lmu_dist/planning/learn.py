"""What finished runs say: results in, the `Knowledge` of laws, noise and information out.

Called by until, proposal and launch/waves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lmu_dist.planning.design import Knowledge
from lmu_dist.planning.information import N_PARAMETERS, Information
from lmu_dist.scaling.constraints import Constraints
from lmu_dist.scaling.diagnostics import check_table, diagnose
from lmu_dist.scaling.fit import Fit, fit
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.misfit import find_misfit
from lmu_dist.scaling.run_losses import RunLoss
from lmu_dist.scaling.shared_noise import find_noise
from lmu_dist.scaling.table import Rows, rows_from_columns

MIN_NOISE = 1e-6  # of ln L; smaller residuals are rounding


def fit_from_starts(family: str, rows: Rows) -> Fit:
    """The fit of a family's table, from several starts."""
    return fit(Chinchilla, rows)


def learn(
    results: Sequence[RunLoss],
    families: Sequence[str],
    assumed: Chinchilla,
    noise: float,
    fit_family: Callable[[str, Rows], Fit] = fit_from_starts,
) -> Knowledge:
    """Fits the law of every family. `assumed` and `noise` take the place of what the runs do not determine yet."""
    laws, reasons = dict[str, Chinchilla](), dict[str, str]()
    fits, unfit = dict[str, Fit](), set[str]()
    for family in families:
        groups = [result.group for result in results if result.family == family]
        found = _law(family, rows_of(results, family), groups, assumed, fit_family)
        laws[family], reasons[family] = found.law, found.reason
        if found.fitted is not None:
            fits[family] = found.fitted
        if found.is_unfit:
            unfit.add(family)
    freedom = sum(len(rows_of(results, family)) - N_PARAMETERS for family in fits)
    known = Knowledge(tuple(results), laws, reasons, noise, 0.0, freedom, _units(results), unfit=frozenset(unfit))
    if not freedom:
        return _with_information(known)
    groups = {family: [r.group for r in results if r.family == family] for family in fits}
    pooled = find_noise([(fitted, rows_of(results, family), groups[family]) for family, fitted in fits.items()])
    return _with_information(replace(known, noise=max(pooled.deviation, MIN_NOISE), shared=pooled.shared))


def assume(results: Sequence[RunLoss], laws: Mapping[str, Chinchilla], noise: float, shared: float = 0.0) -> Knowledge:
    """What results would say if the laws and the noise were known to be these."""
    reasons, freedom = dict[str, str](), 0
    for family in laws:
        rows = rows_of(results, family)
        found = check_table(Chinchilla, rows)
        reasons[family] = found[0] if found else ""
        freedom += 0 if found else len(rows) - N_PARAMETERS
    return _with_information(Knowledge(tuple(results), laws, reasons, noise, shared, freedom, _units(results)))


def _units(results: Sequence[RunLoss]) -> tuple[float, float]:
    n, d = [r.n_params for r in results] or [1e6], [r.tokens for r in results] or [1e7]
    return float(np.exp(np.mean(np.log(n)))), float(np.exp(np.mean(np.log(d))))


def _with_information(knowledge: Knowledge) -> Knowledge:
    information = dict[str, Information]()
    for family in knowledge.laws:
        of_family = [r for r in knowledge.results if r.family == family]
        jacobian = knowledge.rows(family, [r.n_params for r in of_family], [r.tokens for r in of_family])
        information[family] = Information(knowledge.deviation**2, knowledge.common_variance)
        for row, result in zip(jacobian, of_family, strict=True):
            information[family].add(row, result.group)
    return replace(knowledge, information=information)


def rows_of(results: Sequence[RunLoss], family: str) -> Rows:
    """The results of a family as a table."""
    of_family = [r for r in results if r.family == family]
    return rows_from_columns([r.n_params for r in of_family], [r.tokens for r in of_family], [r.loss for r in of_family])


class _Law(NamedTuple):
    """The law of a table, why it is not determined, its fit if it is, and whether its form is wrong."""

    law: Chinchilla
    reason: str
    fitted: Fit | None
    is_unfit: bool


def _law(family: str, rows: Rows, groups: Sequence[str], assumed: Chinchilla, fit_family: Callable[[str, Rows], Fit]) -> _Law:
    """Without a law of its own the table gets the assumed exponents with fitted prefactors, or the assumed law."""
    reasons, misfits = check_table(Chinchilla, rows), list[str]()
    if not reasons:
        fitted = fit_family(family, rows)
        misfits = find_misfit(fitted, rows, groups).reasons
        reasons = [*diagnose(fitted, rows).reasons, *misfits]
        assert isinstance(fitted.law, Chinchilla)
        if not reasons:
            return _Law(fitted.law, "", fitted, False)
    if len(rows) >= N_PARAMETERS:
        held = fit(Chinchilla, rows, Constraints({"alpha": assumed.alpha, "beta": assumed.beta})).law
        assert isinstance(held, Chinchilla)
        return _Law(held, reasons[0], None, bool(misfits))
    return _Law(assumed, reasons[0], None, bool(misfits))
