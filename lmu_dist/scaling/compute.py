"""Compute-optimal N and D of a law, for every convention of counting parameters and FLOPs.

Kaplan's exponent 0.88 and Chinchilla's 0.5 differ largely because they count differently (Porian et al. 2024, arXiv
2406.19146), so results are given for all conventions. The counts come from the run records; nothing is counted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmu_dist.scaling.collect import Run, resampling_groups, rows_from_runs
from lmu_dist.scaling.intervals import Interval, bootstrap_interval
from lmu_dist.scaling.isoflop import Parabola, fit_parabolas, optimal_size_power_law
from lmu_dist.scaling.laws import Floats, ScalingLaw, parameters
from lmu_dist.scaling.table import Rows
from lmu_dist.scaling.validate import FitResult, fit_and_validate

WITHOUT_EMBEDDINGS, WITH_HEAD = "without embeddings", "with the head"
SIX_ND, ALL_PRODUCTS = "6 N D", "every product"
FEW_RESAMPLES = 200  # for the law that only serves as a comparison


@dataclass(frozen=True)
class CountingConvention:
    """The compute-optimal allocation of a law under one counting convention: N_opt grows as C^exponent.

    `n_params` and `tokens` are the optimum at `flops`, the largest compute of any run. They are None if the optimum lies
    outside the range of the runs; the exponent is that of the law and does not depend on this range.

    FLOPs per token are fitted by `k` N^`gamma`; `deviation` is the largest relative error of that. If the fit of the law
    failed a check, there are no parameters.
    """

    counting_n: str
    counting_flops: str
    parameters: dict[str, float] | None
    exponent: float | None
    exponent_interval: Interval | None
    flops: float
    n_params: float | None
    tokens: float | None
    k: float
    gamma: float
    deviation: float
    parabolas: tuple[Parabola, ...]
    parabola_exponent: float | None
    reasons: tuple[str, ...]


def fit_conventions(runs: Sequence[Run], usual: FitResult) -> list[CountingConvention]:
    """Returns all four counting conventions for the runs of a family, first the usual one: N without embeddings and 6 N D.

    `usual` is the fitted law for N without embeddings.
    """
    all_conventions = list[CountingConvention]()
    with_head = fit_and_validate(usual.form, rows_from_runs(runs, with_head=True), resampling_groups(runs), FEW_RESAMPLES)
    for counting_n, result in ((WITHOUT_EMBEDDINGS, usual), (WITH_HEAD, with_head)):
        table = rows_from_runs(runs, with_head=counting_n == WITH_HEAD)
        for counting_flops in (SIX_ND, ALL_PRODUCTS):
            per_token = _flops_per_token(runs, counting_n, counting_flops)
            flops = per_token * table.tokens
            k, gamma, deviation = _fit_flops_per_token(table.n_params, per_token)
            curves = fit_parabolas(table, flops)
            through_optima, max_flops, law = optimal_size_power_law(curves), float(flops.max()), result.law
            n, d = law.optimum(max_flops, k, gamma) if law else (np.array(np.nan), np.array(np.nan))
            inside = bool(within_table(table, n, d))
            exponent = _exponent(law, gamma) if law else None
            resampled = np.array([_exponent(other, gamma) for other in result.laws])
            all_conventions.append(
                CountingConvention(
                    counting_n=counting_n,
                    counting_flops=counting_flops,
                    parameters=parameters(law) if law else None,
                    exponent=exponent,
                    exponent_interval=bootstrap_interval(exponent, resampled, result.correction)
                    if exponent and len(resampled)
                    else None,
                    flops=max_flops,
                    n_params=float(n) if inside else None,
                    tokens=float(d) if inside else None,
                    k=k,
                    gamma=gamma,
                    deviation=deviation,
                    parabolas=tuple(curves),
                    parabola_exponent=through_optima[1] if through_optima else None,
                    reasons=result.diagnostics.reasons,
                )
            )
    return all_conventions


def within_table(table: Rows, n_params: Floats, tokens: Floats) -> NDArray[np.bool_]:
    """Returns where sizes and tokens lie within the range of a table; False for nan."""
    inside = (n_params >= table.n_params.min()) & (n_params <= table.n_params.max())
    return np.asarray(inside & (tokens >= table.tokens.min()) & (tokens <= table.tokens.max()))


def _flops_per_token(runs: Sequence[Run], counting_n: str, counting_flops: str) -> Floats:
    if counting_flops == ALL_PRODUCTS:
        return np.array([r.record.training_flops_per_token for r in runs])
    if counting_n == WITHOUT_EMBEDDINGS:
        return np.array([r.record.training_flops_per_token_kaplan for r in runs])
    # The definition of this convention; the records do not store it.
    return np.array([6.0 * r.record.n_params_with_head for r in runs])


def _exponent(law: ScalingLaw, gamma: float) -> float:
    form = law.additive()
    assert form is not None  # the report fits Chinchilla's law
    return form.beta / (form.alpha + gamma * form.beta)


def _fit_flops_per_token(n_params: Floats, per_token: Floats) -> tuple[float, float, float]:
    """Fits per_token = k N^gamma and returns (k, gamma, largest relative error)."""
    x, y = np.log(n_params), np.log(per_token)
    if np.ptp(x) < 1e-9:
        return float(np.exp(np.mean(y - x))), 1.0, 0.0
    gamma, offset = np.polyfit(x, y, 1)
    return float(np.exp(offset)), float(gamma), float(np.abs(np.expm1(y - gamma * x - offset)).max())
