"""Fitting: a table of sizes, tokens and losses in, a law and what speaks for and against it out.

Minimises the sum of Huber terms of ln L, as in the replication of Chinchilla by Besiroglu et al. 2024 (arXiv 2404.10102), or
the squares of L for a law whose authors do so. The starts come from variable projection: for given exponents the prefactors
are a linear problem, so only exponents are searched.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from lmu_dist.scaling.laws import SQRT_SIX, Chinchilla, Floats, Gadre, Kaplan, Law
from lmu_dist.scaling.table import Rows

DELTA = 1e-3  # where the Huber term turns from a square to a line, in ln nats
EXPONENTS = np.linspace(0.05, 1.2, 24)  # the grid of exponents from which the search starts
LITERATURE = {Chinchilla: (0.34, 0.28), Gadre: (0.26, 0.26), Kaplan: (0.103, 0.738)}  # a start that has not seen the table
N_STARTS = 5


@dataclass(frozen=True)
class Fit:
    """A law and the sum of Huber terms it leaves, which the fit has minimised unless the form asks for least squares of L.

    `gradient` is the objective's by the fitted parameters, largest component, as a share of what the single rows pull;
    `reached` is what every start came to: the objective minimised, and E and the exponents; `condition` is the condition
    number of the residuals' Jacobian, columns scaled; `leverage` is each run's, 1 for one that the law meets whatever it
    says.
    """

    law: Law
    objective: float
    minimised: float
    gradient: float
    reached: tuple[tuple[float, Floats], ...]
    condition: float
    leverage: Floats


def n_parameters(form: type[Law]) -> int:
    """How many numbers a law has."""
    return len(fields(form))  # pyright: ignore


def fit(form: type[Law], rows: Rows) -> Fit:
    """The law of a form that minimises its objective, from several starts. Raises ValueError for fewer rows than parameters."""
    if len(rows) < n_parameters(form):
        raise ValueError(f"a law of {n_parameters(form)} parameters needs more than {len(rows)} runs")
    reached = [refit(start, rows) for start in _starts(form, rows)]
    best = min(reached, key=lambda fit: fit.minimised)
    return replace(best, reached=tuple((fit.minimised, unitless(fit.law)) for fit in reached))


def unitless(law: Law) -> Floats:
    """The parameters that mean the same in any unit of N and D: exponents, and E where there is one."""
    return np.array([getattr(law, name) for name in unitless_names(type(law))])


def unitless_names(form: type[Law]) -> list[str]:
    """Their names."""
    return [*form.EXPONENTS, *(["E"] if form.HAS_FLOOR else [])]


def refit(
    start: Law,
    rows: Rows,
    weights: Floats | None = None,
    tolerance: float = 1e-8,
    held: str | None = None,
    most_steps: int = 3000,
) -> Fit:
    """The law that minimises the (weighted) objective, from one start, until the gradient in units of DELTA^2 is small.

    `held` is a parameter without units (E or an exponent) that keeps the value of the start.
    """
    problem = _Problem(type(start), rows, weights)
    free = np.array([f.name != held for f in fields(start)])  # pyright: ignore
    with np.errstate(all="ignore"):  # what overflows on the way is turned down by the optimiser
        first = problem.vector(start)

        def objective(x: Floats) -> tuple[float, Floats]:
            value, gradient = problem.objective(_filled(first, free, x))
            return value, gradient[free]

        options = {"gtol": tolerance, "maxiter": most_steps}
        found = minimize(objective, first[free], jac=True, method="BFGS", options=options)
        vector = _filled(first, free, found.x)
        _, slope, jacobian = problem.terms(vector)
        law, jacobian = problem.law(vector), jacobian[:, free]
        pull = np.abs(jacobian * slope[:, None]).sum(axis=0)
        gradient = float((np.abs(jacobian.T @ slope) / np.where(pull > 0, pull, 1)).max())
        left = float(huber(log_residuals(law, rows)).sum())
        return Fit(law, left, float(found.fun) * DELTA**2, gradient, (), *_conditioning(jacobian))


def _filled(vector: Floats, free: NDArray[np.bool_], values: Floats) -> Floats:
    filled = vector.copy()
    filled[free] = values
    return filled


def unit_of_loss(rows: Rows) -> float:
    """What squares of the loss are measured in, so that no tolerance depends on its unit: its geometric mean."""
    return float(np.exp(np.log(rows.loss).mean()))


def log_residuals(law: Law, rows: Rows) -> Floats:
    """ln predicted - ln seen."""
    return np.log(law.loss(rows.n_params, rows.tokens)) - np.log(rows.loss)


def huber(residuals: Floats) -> Floats:
    """The terms of the objective."""
    size = np.abs(residuals)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))


class _Problem:
    """The objective over a vector of parameters: N and D in units of their geometric means, prefactors as logarithms.

    Plain units would make exponents and prefactors one and the same direction.
    """

    def __init__(self, form: type[Law], rows: Rows, weights: Floats | None) -> None:
        self.form, self.weights = form, weights
        self.units = np.exp(np.log(rows.n_params).mean()), np.exp(np.log(rows.tokens).mean())
        self.unit_of_loss = unit_of_loss(rows)
        self.n, self.d, self.loss = rows.n_params / self.units[0], rows.tokens / self.units[1], rows.loss
        self.logged = np.array([f.name in form.LOGGED for f in fields(form)])  # pyright: ignore

    def vector(self, law: Law) -> Floats:
        """A law in plain units as the vector."""
        scaled = law.rescaled(1 / self.units[0], 1 / self.units[1])
        values = np.array([getattr(scaled, f.name) for f in fields(self.form)])  # pyright: ignore
        return np.where(self.logged, np.log(np.where(self.logged, values, 1)), values)

    def _scaled(self, vector: Floats) -> Law:
        return self.form(*(float(v) for v in np.where(self.logged, np.exp(np.where(self.logged, vector, 0)), vector)))

    def law(self, vector: Floats) -> Law:
        """The vector as a law in plain units."""
        return self._scaled(vector).rescaled(float(self.units[0]), float(self.units[1]))

    def terms(self, vector: Floats) -> tuple[Floats, Floats, Floats]:
        """Terms of the objective, their slopes by the residual, both weighted, and the residuals' Jacobian by the vector."""
        law = self._scaled(vector)
        loss = law.loss(self.n, self.d)
        chain = np.where(self.logged, np.exp(np.where(self.logged, vector, 0)), 1)
        jacobian = law.gradient(self.n, self.d) * chain
        if self.form.SQUARES:
            residual, jacobian = (loss - self.loss) / self.unit_of_loss, jacobian / self.unit_of_loss
            value, slope = 0.5 * residual**2, residual
        else:
            residual = np.log(loss / self.loss)
            value, slope, jacobian = huber(residual), np.clip(residual, -DELTA, DELTA), jacobian / loss[:, None]
        if self.weights is not None:
            value, slope = value * self.weights, slope * self.weights
        return value, slope, jacobian

    def objective(self, vector: Floats) -> tuple[float, Floats]:
        """In units of the turning point squared: tolerances of the optimiser are made for values around one."""
        value, slope, jacobian = self.terms(vector)
        total = float(value.sum())
        if not np.isfinite(total):
            return np.inf, np.zeros(len(vector))
        return total / DELTA**2, jacobian.T @ slope / DELTA**2


def _conditioning(jacobian: Floats) -> tuple[float, Floats]:
    """Condition number, columns scaled, and leverage of every row."""
    norms = np.linalg.norm(jacobian, axis=0)
    if not np.all(np.isfinite(jacobian)) or np.any(norms < 1e-9 * norms.max()):
        return float("inf"), np.zeros(len(jacobian))
    left, values, _ = np.linalg.svd(jacobian / norms, full_matrices=False)
    return float(values[0] / max(values[-1], 1e-300)), np.square(left).sum(axis=1)


def _starts(form: type[Law], rows: Rows) -> list[Law]:
    """Independent starts: the best points of the grid of exponents that are no neighbours, and the literature's exponents."""
    units = np.exp(np.log(rows.n_params).mean()), np.exp(np.log(rows.tokens).mean())
    n, d = rows.n_params / units[0], rows.tokens / units[1]
    pairs = [(a, b) for a in EXPONENTS for b in EXPONENTS if form is not Gadre or a == b]
    ranked = sorted((_project(form, a, b, n, d, rows.loss) for a, b in pairs), key=lambda found: found[0])
    chosen = list[tuple[float, tuple[float, float], Law]]()
    for candidate in ranked:
        apart = all(max(abs(np.subtract(candidate[1], other))) > 0.16 for _, other, _ in chosen)
        if np.isfinite(candidate[0]) and apart:
            chosen.append(candidate)
        if len(chosen) == N_STARTS - 1:
            break
    chosen.append(_project(form, *LITERATURE[form], n, d, rows.loss))
    return [law.rescaled(float(units[0]), float(units[1])) for _, _, law in chosen]


def _project(
    form: type[Law], first: float, second: float, n: Floats, d: Floats, loss: Floats
) -> tuple[float, tuple[float, float], Law]:
    """(objective, exponents, law) with the prefactors, none negative, that are best for given exponents by relative squares."""
    seen = np.maximum(loss, np.median(loss) / 3)  # or one absurdly low loss would be all that a relative fit sees
    if form is Kaplan:
        columns, target = np.stack([n**-second, 1 / d]), seen ** (1 / first)
    else:
        columns, target = np.stack([np.ones_like(n), n**-first, d**-second]), seen
    found, _ = nnls((columns / target).T, np.ones_like(target))
    weights = [float(w) for w in np.maximum(found, 1e-3 * target.min())]
    if form is Kaplan:
        law: Law = Kaplan(weights[0] ** (1 / second), weights[1], float(first * second), float(first))
    elif form is Gadre:
        law = Gadre(weights[0], weights[1], float(weights[2] / SQRT_SIX**-first), -float(first))
    else:
        law = Chinchilla(weights[0], weights[1], weights[2], float(first), float(second))
    return float(huber(log_residuals(law, Rows(n, d, loss))).sum()), (first, second), law
