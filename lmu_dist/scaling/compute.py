"""Compute: how a law splits a budget of FLOPs between N and D, under each convention of counting either.

Kaplan's exponent .88 and Chinchilla's .5 differ for a good part by what is counted (Porian et al. 2024, arXiv 2406.19146),
so the choice is shown with every law. Counts come from the records; nothing is counted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmu_dist.scaling.collect import Run, labels, rows
from lmu_dist.scaling.examine import Examination, examine
from lmu_dist.scaling.intervals import Interval, around
from lmu_dist.scaling.isoflop import Parabola, frontier, parabolas
from lmu_dist.scaling.laws import Floats, Law, parameters
from lmu_dist.scaling.table import Rows

BODY, WITH_HEAD = "without embeddings", "with the head"
SIX_ND, ALL_PRODUCTS = "6 N D", "every product"
FEW_RESAMPLES = 200  # for the law that is only there to be compared


@dataclass(frozen=True)
class Convention:
    """A law of one way of counting. N_opt grows as C^exponent; `n_params` and `tokens` are the optimum at `flops`, the most
    seen.

    They are None where the optimum lies outside the sizes and tokens seen; the exponent is of the law, wherever that holds.

    FLOPs per token are `k` N^`gamma`, within `deviation` (relative, worst run). Without a certificate there is no law.
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


def conventions(runs: Sequence[Run], body: Examination) -> list[Convention]:
    """All four ways of counting for the runs of a family, the usual one (body, 6ND) first; `body` is its examined law."""
    found = list[Convention]()
    with_head = examine(body.form, rows(runs, with_head=True), labels(runs), FEW_RESAMPLES)
    for counting_n, seen in ((BODY, body), (WITH_HEAD, with_head)):
        table = rows(runs, with_head=counting_n == WITH_HEAD)
        for counting_flops in (SIX_ND, ALL_PRODUCTS):
            per_token = _flops_per_token(runs, counting_n, counting_flops)
            flops = per_token * table.tokens
            k, gamma, deviation = _power(table.n_params, per_token)
            curves = parabolas(table, flops)
            through, most, law = frontier(curves), float(flops.max()), seen.law
            n, d = law.optimum(most, k, gamma) if law else (np.array(np.nan), np.array(np.nan))
            inside = bool(within(table, n, d))
            exponent = _exponent(law, gamma) if law else None
            drawn = np.array([_exponent(other, gamma) for other in seen.laws])
            found.append(
                Convention(
                    counting_n=counting_n,
                    counting_flops=counting_flops,
                    parameters=parameters(law) if law else None,
                    exponent=exponent,
                    exponent_interval=around(exponent, drawn, seen.widen) if exponent and len(drawn) else None,
                    flops=most,
                    n_params=float(n) if inside else None,
                    tokens=float(d) if inside else None,
                    k=k,
                    gamma=gamma,
                    deviation=deviation,
                    parabolas=tuple(curves),
                    parabola_exponent=through[1] if through else None,
                    reasons=seen.certificate.reasons,
                )
            )
    return found


def within(table: Rows, n_params: Floats, tokens: Floats) -> NDArray[np.bool_]:
    """Where sizes and tokens are among those seen; False for nan."""
    inside = (n_params >= table.n_params.min()) & (n_params <= table.n_params.max())
    return np.asarray(inside & (tokens >= table.tokens.min()) & (tokens <= table.tokens.max()))


def _flops_per_token(runs: Sequence[Run], counting_n: str, counting_flops: str) -> Floats:
    if counting_flops == ALL_PRODUCTS:
        return np.array([r.record.training_flops_per_token for r in runs])
    if counting_n == BODY:
        return np.array([r.record.training_flops_per_token_kaplan for r in runs])
    return np.array([6.0 * r.record.n_params_with_head for r in runs])  # the convention's definition; no record has it


def _exponent(law: Law, gamma: float) -> float:
    form = law.additive()
    return form.beta / (form.alpha + gamma * form.beta)


def _power(n_params: Floats, per_token: Floats) -> tuple[float, float, float]:
    """(k, gamma, worst relative deviation) of per_token = k N^gamma."""
    x, y = np.log(n_params), np.log(per_token)
    if np.ptp(x) < 1e-9:
        return float(np.exp(np.mean(y - x))), 1.0, 0.0
    gamma, offset = np.polyfit(x, y, 1)
    return float(np.exp(offset)), float(gamma), float(np.abs(np.expm1(y - gamma * x - offset)).max())
