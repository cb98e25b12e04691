"""Fits a scaling law to a table: sizes, tokens and losses in, the law and the numbers needed to judge it out.

Minimises the sum of Huber losses of ln L, as in the replication of Chinchilla by Besiroglu et al. 2024 (arXiv 2404.10102), or
the squared errors of L for a law whose authors do so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lmu_dist.scaling.laws import Floats, ScalingLaw, parameter_names
from lmu_dist.scaling.minimise import minimise
from lmu_dist.scaling.objective import DELTA, Objective, huber, log_residuals
from lmu_dist.scaling.starts import start_laws
from lmu_dist.scaling.table import Rows


@dataclass(frozen=True)
class Fit:
    """A fitted law and the numbers needed to judge the fit.

    `objective` is the sum of Huber losses of ln L. `minimised_objective` is the objective that was minimised: the same, or, for
    a law with LEAST_SQUARES, half the squared errors of L in units of its geometric mean. `gradient` is the largest component
    of the objective's gradient, relative to the sum of the rows' absolute contributions to it. `start_optima` has, for every
    start, the objective reached, and E and the exponents found. `condition` is the condition number of the residuals' Jacobian
    with scaled columns. `leverage` is that of each run; a run with leverage 1 is met exactly, whatever its loss.
    """

    law: ScalingLaw
    objective: float
    minimised_objective: float
    gradient: float
    start_optima: tuple[tuple[float, Floats], ...]
    condition: float
    leverage: Floats


def n_parameters(form: type[ScalingLaw]) -> int:
    """Returns the number of parameters of a law."""
    return len(parameter_names(form))


def fit(
    form: type[ScalingLaw], rows: Rows, held: Mapping[str, float] | None = None, extra_starts: Sequence[ScalingLaw] = ()
) -> Fit:
    """Fits a law from several starts and returns the best fit. Raises ValueError for fewer rows than parameters.

    `held` has parameters without units that keep a value. `extra_starts` are further starts.
    """
    if len(rows) < n_parameters(form):
        raise ValueError(f"a law with {n_parameters(form)} parameters needs more than {len(rows)} runs")
    objective, held = Objective(form, rows), held or {}
    starts = [replace(start, **held) for start in (*start_laws(form, rows), *extra_starts)]  # pyright: ignore
    free = np.array([name not in held for name in parameter_names(form)])
    with np.errstate(all="ignore"):
        vectors = np.array([objective.vector(start) for start in starts])
        found = minimise(objective, vectors, free=free)
        best = int(np.argmin(found.values))
        optima = [
            (float(v) * DELTA**2, unitless_values(objective.law(x))) for v, x in zip(found.values, found.vectors, strict=True)
        ]
    judged = _judged(objective, rows, found.vectors[best], float(found.values[best]), None, free)
    return replace(judged, start_optima=tuple(optima))


def unitless_values(law: ScalingLaw) -> Floats:
    """Returns the parameters that do not depend on the units of N and D: the exponents, and E if the law has it."""
    return np.array([getattr(law, name) for name in unitless_names(type(law))])


def unitless_names(form: type[ScalingLaw]) -> list[str]:
    """Returns the names of the parameters that do not depend on the units of N and D."""
    return [*form.EXPONENTS, *(["E"] if form.HAS_FLOOR else [])]


def refit(
    start: ScalingLaw,
    rows: Rows,
    weights: Floats | None = None,
    tolerance: float = 1e-8,
    fixed: str | Sequence[str] | None = None,
    max_steps: int = 3000,
) -> Fit:
    """Minimises the (weighted) objective from one start, until the gradient in units of DELTA^2 is below `tolerance`.

    `fixed` names coordinates that keep their start value: parameters without units (E or exponents).
    """
    objective = Objective(type(start), rows)
    names = [fixed] if isinstance(fixed, str) else list(fixed or ())
    free = np.array([name not in names for name in parameter_names(type(start))])
    with np.errstate(all="ignore"):
        found = minimise(
            objective,
            objective.vector(start)[None],
            None if weights is None else np.asarray(weights)[None],
            free,
            tolerance,
            far=0,
            max_steps=max_steps,
        )
    return _judged(objective, rows, found.vectors[0], float(found.values[0]), weights, free)


def _judged(
    objective: Objective, rows: Rows, vector: Floats, value: float, weights: Floats | None, free: NDArray[np.bool_]
) -> Fit:
    """Returns the fit at a vector, with the numbers needed to judge it."""
    with np.errstate(all="ignore"):
        residuals, jacobian = objective.residuals_and_jacobian(vector)
        slope, jacobian = objective.slopes(residuals), jacobian[:, free]
        if weights is not None:
            slope = slope * weights
        pull = np.abs(jacobian * slope[:, None]).sum(axis=0)
        gradient = float((np.abs(jacobian.T @ slope) / np.where(pull > 0, pull, 1)).max())
        law = objective.law(vector)
        huber_sum = float(huber(log_residuals(law, rows)).sum())
        return Fit(law, huber_sum, value * DELTA**2, gradient, (), *_conditioning(jacobian))


def _conditioning(jacobian: Floats) -> tuple[float, Floats]:
    """Returns the condition number of the Jacobian with scaled columns, and the leverage of every row."""
    norms = np.linalg.norm(jacobian, axis=0)
    if not np.all(np.isfinite(jacobian)) or np.any(norms < 1e-9 * norms.max()):
        return float("inf"), np.zeros(len(jacobian))
    left, values, _ = np.linalg.svd(jacobian / norms, full_matrices=False)
    return float(values[0] / max(values[-1], 1e-300)), np.square(left).sum(axis=1)
