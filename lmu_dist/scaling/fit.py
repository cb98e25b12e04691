"""Fits a scaling law to a table: sizes, tokens and losses in, the law and the numbers needed to judge it out.

Minimises the sum of Huber losses of ln L, as in the replication of Chinchilla by Besiroglu et al. 2024 (arXiv 2404.10102), or
the squared errors of L for a law whose authors do so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lmu_dist.scaling.constraints import NONE, Constraints
from lmu_dist.scaling.laws import Floats, ScalingLaw, parameter_names, unitless_names
from lmu_dist.scaling.minimise import Optima, minimise
from lmu_dist.scaling.objective import DELTA, Objective, huber, log_residuals
from lmu_dist.scaling.starts import start_laws
from lmu_dist.scaling.table import Rows

SAME_OPTIMUM = 1e-6  # relative difference of two objectives
SIMPLE = 5  # laws with more parameters start again around their best optimum if only one start found it
N_KINKS, N_KINK_GRIDS, KINK_REACH = 13, 7, 0.7  # of a logarithm
N_RESTARTS, RESTART_DISTANCE = 4, 0.1


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
    constraints: Constraints
    objective: float
    minimised_objective: float
    gradient: float
    start_optima: tuple[tuple[float, Floats], ...]
    condition: float
    leverage: Floats

    @property
    def n_free(self) -> int:
        """The number of parameters that were fitted: without those that are held or tied to another."""
        return self.constraints.n_free(type(self.law))


def n_parameters(form: type[ScalingLaw]) -> int:
    """Returns the number of parameters of a law."""
    return len(parameter_names(form))


def fit(form: type[ScalingLaw], rows: Rows, constraints: Constraints = NONE, extra_starts: Sequence[ScalingLaw] = ()) -> Fit:
    """Fits a law from several starts and returns the best fit. Raises ValueError for fewer rows than free parameters."""
    if len(rows) < (n_free := constraints.n_free(form)):
        raise ValueError(f"a law with {n_free} free parameters needs more than {len(rows)} runs")
    objective, basis = Objective(form, rows), constraints.basis(form)
    starts = [constraints.apply(start) for start in (*start_laws(form, rows), *extra_starts)]
    if form.KINK and form.KINK not in constraints.names():
        starts = _at_best_kink(objective, starts, basis)
    with np.errstate(all="ignore"):
        vectors = np.array([objective.vector(start) for start in starts])
        found = minimise(objective, vectors, basis=basis)
        lowest = found.values.min()
        if n_parameters(form) > SIMPLE and np.sum(found.values <= lowest + SAME_OPTIMUM * abs(lowest)) < 2:
            found = _with_restarts(objective, found, basis)
        best = int(np.argmin(found.values))
        found_values = zip(found.values, found.vectors, strict=True)
        optima = tuple((float(value) * DELTA**2, unitless_values(objective.law(vector))) for value, vector in found_values)
    judged = _judged(objective, rows, found.vectors[best], float(found.values[best]), None, constraints)
    return replace(judged, start_optima=optima)


def _at_best_kink(objective: Objective, starts: Sequence[ScalingLaw], basis: Floats) -> list[ScalingLaw]:
    """Returns the starts with the best value of the parameter that has a kink: from a coarse grid, and then finer ones."""
    index = parameter_names(objective.form).index(objective.form.KINK)
    with np.errstate(all="ignore"):
        vectors = np.array([objective.vector(start) for start in starts])
        found = minimise(objective, vectors, basis=basis, tolerance=1e-2)
        reach = KINK_REACH
        for _ in range(N_KINK_GRIDS):
            best = found.vectors[int(np.argmin(found.values))]
            around = np.repeat(best[None], N_KINKS, axis=0)
            around[:, index] += np.linspace(-reach, reach, N_KINKS)
            again = minimise(objective, around, basis=basis, tolerance=1e-2, far=5)
            found = Optima(
                *(np.concatenate([getattr(o, name) for o in (found, again)]) for name in ("vectors", "values", "gradients"))
            )
            reach /= N_KINKS / 4
        best = found.vectors[int(np.argmin(found.values))]
        vectors[:, index] = best[index]
        return [objective.law(vector) for vector in (best, *vectors)]


def _with_restarts(objective: Objective, found: Optima, basis: Floats) -> Optima:
    """Adds optima from starts around the best one: laws with many parameters have starts that end in worse valleys."""
    best = found.vectors[int(np.argmin(found.values))]
    shifts = np.random.default_rng(0).normal(0, RESTART_DISTANCE, (N_RESTARTS, len(basis))) @ basis
    again = minimise(objective, best + shifts, basis=basis)
    return Optima(*(np.concatenate([getattr(o, name) for o in (found, again)]) for name in ("vectors", "values", "gradients")))


def unitless_values(law: ScalingLaw) -> Floats:
    """Returns the parameters that do not depend on the units of N and D: the exponents, and E if the law has it."""
    return np.array([getattr(law, name) for name in unitless_names(type(law))])


def refit(
    start: ScalingLaw,
    rows: Rows,
    weights: Floats | None = None,
    tolerance: float = 1e-8,
    constraints: Constraints = NONE,
    max_steps: int = 3000,
    always_huber: bool = False,
) -> Fit:
    """Minimises the (weighted) objective from one start, until the gradient in units of DELTA^2 is below `tolerance`.

    With `always_huber` Huber losses of ln L are minimised, also for a law with LEAST_SQUARES.
    """
    objective, basis = Objective(type(start), rows, always_huber), constraints.basis(type(start))
    many = None if weights is None else np.asarray(weights)[None]
    with np.errstate(all="ignore"):
        vectors = objective.vector(constraints.apply(start))[None]
        found = minimise(objective, vectors, many, basis, tolerance, far=0, max_steps=max_steps)
    return _judged(objective, rows, found.vectors[0], float(found.values[0]), weights, constraints)


def fit_parts(
    form: type[ScalingLaw],
    rows: Rows,
    parts: Sequence[NDArray[np.bool_]],
    constraints: Constraints,
    tolerance: float,
    max_steps: int,
) -> list[ScalingLaw]:
    """Returns the laws fitted to parts of a table, given as masks (rows), each from the starts of its own rows.

    They end where gradients are below `tolerance` (as in `refit`), or after `max_steps`. The fits take their steps together, so
    that a few parts take little longer than one. Nothing is checked.
    """
    if form.KINK and form.KINK not in constraints.names():
        return [fit(form, rows.where(part), constraints).law for part in parts]
    objective, basis = Objective(form, rows), constraints.basis(form)
    starts = [[constraints.apply(start) for start in start_laws(form, rows.where(part))] for part in parts]
    part_of = np.repeat(np.arange(len(parts)), [len(laws) for laws in starts])
    with np.errstate(all="ignore"):
        vectors = np.array([objective.vector(law) for laws in starts for law in laws])
        weights = np.array(parts, np.float64)[part_of]
        found = minimise(objective, vectors, weights, basis, tolerance, max_steps=max_steps)
        best = [int(np.argmin(np.where(part_of == i, found.values, np.inf))) for i in range(len(parts))]
        return [objective.law(found.vectors[i]) for i in best]


def refit_simulated(start: ScalingLaw, rows: Rows, losses: Floats, max_steps: int = 3000) -> list[ScalingLaw]:
    """Returns the laws fitted to simulations of a table, each with its own `losses` (simulations, rows), from one start.

    The fits take their steps together, which is many times faster than `refit` for each.
    """
    objective = Objective(type(start), rows)
    with np.errstate(all="ignore"):
        starts = np.repeat(objective.vector(start)[None], len(losses), axis=0)
        found = minimise(objective, starts, far=0, max_steps=max_steps, losses=losses)
        return [objective.law(vector) for vector in found.vectors]


def _judged(
    objective: Objective, rows: Rows, vector: Floats, value: float, weights: Floats | None, constraints: Constraints
) -> Fit:
    """Returns the fit at a vector, with the numbers needed to judge it."""
    basis = constraints.basis(objective.form)
    with np.errstate(all="ignore"):
        residuals, jacobian = objective.residuals_and_jacobian(vector)
        slope, jacobian = objective.slopes(residuals), jacobian @ basis.T
        if weights is not None:
            slope = slope * weights
        pull = np.abs(jacobian * slope[:, None]).sum(axis=0)
        gradient = float((np.abs(jacobian.T @ slope) / np.where(pull > 0, pull, 1)).max())
        law = objective.law(vector)
        huber_sum = float(huber(log_residuals(law, rows)).sum())
        return Fit(law, constraints, huber_sum, value * DELTA**2, gradient, (), *_conditioning(jacobian))


def _conditioning(jacobian: Floats) -> tuple[float, Floats]:
    """Returns the condition number of the Jacobian with scaled columns, and the leverage of every row."""
    norms = np.linalg.norm(jacobian, axis=0)
    if not np.all(np.isfinite(jacobian)) or np.any(norms < 1e-9 * norms.max()):
        return float("inf"), np.zeros(len(jacobian))
    left, values, _ = np.linalg.svd(jacobian / norms, full_matrices=False)
    return float(values[0] / max(values[-1], 1e-300)), np.square(left).sum(axis=1)
