"""Fits a scaling law to a table: sizes, tokens and losses in, the law and the numbers needed to judge it out.

Minimises the sum of Huber losses of ln L, as in the replication of Chinchilla by Besiroglu et al. 2024 (arXiv 2404.10102), or
the squared errors of L for a law whose authors do so. Start points come from variable projection: for given exponents the
prefactors are a linear least-squares problem, so only the exponents are searched.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from lmu_dist.scaling.laws import SQRT_SIX, Chinchilla, Floats, Gadre, Kaplan, ScalingLaw
from lmu_dist.scaling.table import Rows

DELTA = 1e-3  # residual of ln L at which the Huber loss changes from quadratic to linear
EXPONENT_GRID = np.linspace(0.05, 1.2, 24)  # start points are chosen from this grid
PUBLISHED_EXPONENTS = {
    Chinchilla: (0.34, 0.28),
    Gadre: (0.26, 0.26),
    Kaplan: (0.103, 0.738),
}  # a start
N_STARTS = 5


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
    return len(fields(form))  # pyright: ignore


def fit(form: type[ScalingLaw], rows: Rows) -> Fit:
    """Fits a law from several starts and returns the best fit. Raises ValueError for fewer rows than parameters."""
    if len(rows) < n_parameters(form):
        raise ValueError(f"a law with {n_parameters(form)} parameters needs more than {len(rows)} runs")
    fits = [refit(start, rows) for start in _starts(form, rows)]
    best = min(fits, key=lambda fit: fit.minimised_objective)
    return replace(best, start_optima=tuple((fit.minimised_objective, unitless_values(fit.law)) for fit in fits))


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
    fixed: str | None = None,
    max_steps: int = 3000,
) -> Fit:
    """Minimises the (weighted) objective from one start, until the gradient in units of DELTA^2 is below `tolerance`.

    `fixed` names a parameter without units (E or an exponent) that keeps its start value.
    """
    problem = _Objective(type(start), rows, weights)
    free = np.array([f.name != fixed for f in fields(start)])  # pyright: ignore
    with np.errstate(all="ignore"):  # the optimiser rejects steps that overflow
        first = problem.vector(start)

        def objective(x: Floats) -> tuple[float, Floats]:
            value, gradient = problem.objective(_insert_free(first, free, x))
            return value, gradient[free]

        options = {"gtol": tolerance, "maxiter": max_steps}
        solution = minimize(objective, first[free], jac=True, method="BFGS", options=options)
        vector = _insert_free(first, free, solution.x)
        _, slope, jacobian = problem.terms(vector)
        law, jacobian = problem.law(vector), jacobian[:, free]
        pull = np.abs(jacobian * slope[:, None]).sum(axis=0)
        gradient = float((np.abs(jacobian.T @ slope) / np.where(pull > 0, pull, 1)).max())
        huber_sum = float(huber(log_residuals(law, rows)).sum())
        return Fit(law, huber_sum, float(solution.fun) * DELTA**2, gradient, (), *_conditioning(jacobian))


def _insert_free(vector: Floats, free: NDArray[np.bool_], values: Floats) -> Floats:
    filled = vector.copy()
    filled[free] = values
    return filled


def unit_of_loss(rows: Rows) -> float:
    """Returns the geometric mean of the loss, by which errors of L are divided so that tolerances do not depend on its unit."""
    return float(np.exp(np.log(rows.loss).mean()))


def log_residuals(law: ScalingLaw, rows: Rows) -> Floats:
    """Returns ln(predicted loss) - ln(measured loss) of every row."""
    return np.log(law.loss(rows.n_params, rows.tokens)) - np.log(rows.loss)


def huber(residuals: Floats) -> Floats:
    """Returns the Huber loss of every residual, with threshold DELTA."""
    size = np.abs(residuals)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))


class _Objective:
    """The objective as a function of a parameter vector: N and D in units of their geometric means, prefactors as logarithms.

    With plain units, exponents and prefactors would be almost perfectly correlated.
    """

    def __init__(self, form: type[ScalingLaw], rows: Rows, weights: Floats | None) -> None:
        self.form, self.weights = form, weights
        self.units = np.exp(np.log(rows.n_params).mean()), np.exp(np.log(rows.tokens).mean())
        self.unit_of_loss = unit_of_loss(rows)
        self.n, self.d, self.loss = rows.n_params / self.units[0], rows.tokens / self.units[1], rows.loss
        self.is_log = np.array([f.name in form.LOG_PARAMETERS for f in fields(form)])  # pyright: ignore

    def vector(self, law: ScalingLaw) -> Floats:
        """Returns the parameter vector of a law given in plain units."""
        scaled = law.rescaled(1 / self.units[0], 1 / self.units[1])
        values = np.array([getattr(scaled, f.name) for f in fields(self.form)])  # pyright: ignore
        return np.where(self.is_log, np.log(np.where(self.is_log, values, 1)), values)

    def _scaled(self, vector: Floats) -> ScalingLaw:
        return self.form(*(float(v) for v in np.where(self.is_log, np.exp(np.where(self.is_log, vector, 0)), vector)))

    def law(self, vector: Floats) -> ScalingLaw:
        """Returns the law of a parameter vector, in plain units."""
        return self._scaled(vector).rescaled(float(self.units[0]), float(self.units[1]))

    def terms(self, vector: Floats) -> tuple[Floats, Floats, Floats]:
        """Returns, per row, the weighted objective, its derivative by the residual, and the residuals' Jacobian."""
        law = self._scaled(vector)
        loss = law.loss(self.n, self.d)
        chain = np.where(self.is_log, np.exp(np.where(self.is_log, vector, 0)), 1)
        jacobian = law.gradient(self.n, self.d) * chain
        if self.form.LEAST_SQUARES:
            residual, jacobian = (loss - self.loss) / self.unit_of_loss, jacobian / self.unit_of_loss
            value, slope = 0.5 * residual**2, residual
        else:
            residual = np.log(loss / self.loss)
            value, slope, jacobian = huber(residual), np.clip(residual, -DELTA, DELTA), jacobian / loss[:, None]
        if self.weights is not None:
            value, slope = value * self.weights, slope * self.weights
        return value, slope, jacobian

    def objective(self, vector: Floats) -> tuple[float, Floats]:
        """Returns the objective and its gradient in units of DELTA^2, since the optimiser expects values of order one."""
        value, slope, jacobian = self.terms(vector)
        total = float(value.sum())
        if not np.isfinite(total):
            return np.inf, np.zeros(len(vector))
        return total / DELTA**2, jacobian.T @ slope / DELTA**2


def _conditioning(jacobian: Floats) -> tuple[float, Floats]:
    """Returns the condition number of the Jacobian with scaled columns, and the leverage of every row."""
    norms = np.linalg.norm(jacobian, axis=0)
    if not np.all(np.isfinite(jacobian)) or np.any(norms < 1e-9 * norms.max()):
        return float("inf"), np.zeros(len(jacobian))
    left, values, _ = np.linalg.svd(jacobian / norms, full_matrices=False)
    return float(values[0] / max(values[-1], 1e-300)), np.square(left).sum(axis=1)


def _starts(form: type[ScalingLaw], rows: Rows) -> list[ScalingLaw]:
    """Returns start points: the best grid points that are not neighbours, and the published exponents."""
    units = np.exp(np.log(rows.n_params).mean()), np.exp(np.log(rows.tokens).mean())
    n, d = rows.n_params / units[0], rows.tokens / units[1]
    pairs = [(a, b) for a in EXPONENT_GRID for b in EXPONENT_GRID if form is not Gadre or a == b]
    ranked = sorted((_best_prefactors(form, a, b, n, d, rows.loss) for a, b in pairs), key=lambda candidate: candidate[0])
    chosen = list[tuple[float, tuple[float, float], ScalingLaw]]()
    for candidate in ranked:
        is_distinct = all(max(abs(np.subtract(candidate[1], other))) > 0.16 for _, other, _ in chosen)
        if np.isfinite(candidate[0]) and is_distinct:
            chosen.append(candidate)
        if len(chosen) == N_STARTS - 1:
            break
    chosen.append(_best_prefactors(form, *PUBLISHED_EXPONENTS[form], n, d, rows.loss))
    return [law.rescaled(float(units[0]), float(units[1])) for _, _, law in chosen]


def _best_prefactors(
    form: type[ScalingLaw], first: float, second: float, n: Floats, d: Floats, loss: Floats
) -> tuple[float, tuple[float, float], ScalingLaw]:
    """Finds the non-negative prefactors for given exponents by relative least squares; returns (objective, exponents, law)."""
    clipped = np.maximum(loss, np.median(loss) / 3)  # otherwise a single absurdly low loss would dominate the relative fit
    if form is Kaplan:
        columns, target = np.stack([n**-second, 1 / d]), clipped ** (1 / first)
    else:
        columns, target = np.stack([np.ones_like(n), n**-first, d**-second]), clipped
    prefactors, _ = nnls((columns / target).T, np.ones_like(target))
    prefactors = [float(v) for v in np.maximum(prefactors, 1e-3 * target.min())]
    if form is Kaplan:
        law: ScalingLaw = Kaplan(prefactors[0] ** (1 / second), prefactors[1], float(first * second), float(first))
    elif form is Gadre:
        law = Gadre(prefactors[0], prefactors[1], float(prefactors[2] / SQRT_SIX**-first), -float(first))
    else:
        law = Chinchilla(prefactors[0], prefactors[1], prefactors[2], float(first), float(second))
    return float(huber(log_residuals(law, Rows(n, d, loss))).sum()), (first, second), law
