"""Minimises the objective from many starts, or for many weights or losses, at once: arrays of vectors in, of optima out.

First a few steps of Levenberg and Marquardt on reweighted least squares, which find the valley from far away; then BFGS,
which converges in it. All laws take their steps together, so numpy's overhead is paid once for all of them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmu_dist.scaling.laws import Floats, parameter_names
from lmu_dist.scaling.objective import DELTA, Objective

ENTRIES = 200_000  # laws x rows that are evaluated at once; more would leave the processor's cache
ARMIJO = 1e-4


def n_parameters(objective: Objective) -> int:
    """Returns the number of parameters of the objective's law."""
    return len(parameter_names(objective.form))


@dataclass(frozen=True)
class Optima:
    """Optima of a batch: coordinates (laws, parameters), objectives and largest gradients (laws), both in units of DELTA^2."""

    vectors: Floats
    values: Floats
    gradients: Floats


@dataclass
class _State:
    """The current point of every law of a batch, and what was computed there; `hessians` are empty if not asked for."""

    vectors: Floats
    values: Floats
    gradients: Floats
    hessians: Floats


class Batch:
    """A batch of problems on one table: `weights` and `losses` are (laws, rows), or None for ones and the table's losses.

    `basis` (free, parameters) has the directions of change.
    """

    def __init__(self, objective: Objective, weights: Floats | None, losses: Floats | None, basis: Floats | None) -> None:
        self.objective, self.weights, self.losses, self.basis = objective, weights, losses, basis
        self.n_free = n_parameters(objective) if basis is None else len(basis)

    def state(self, vectors: Floats, which: NDArray[np.intp], hessian: bool) -> _State:
        """Returns values, gradients and, if asked for, Hessians of reweighted least squares at vectors (laws, parameters)."""
        measured = None if self.losses is None else self.losses[which]
        residuals, jacobian = self.objective.residuals_and_jacobian(vectors, measured)
        if self.basis is not None:
            jacobian = jacobian @ self.basis.T
        weights = np.ones_like(residuals) if self.weights is None else self.weights[which]
        values = np.sum(weights * self.objective.row_values(residuals), axis=1) / DELTA**2
        slopes = weights * self.objective.slopes(residuals)
        gradients = np.matmul(slopes[:, None, :], jacobian)[:, 0] / DELTA**2
        good = np.isfinite(values) & np.all(np.isfinite(gradients), axis=1)
        hessians = np.empty((0, self.n_free, self.n_free))
        if hessian:
            scaled = jacobian * (weights * self.objective.curvatures(residuals))[..., None]
            hessians = np.matmul(jacobian.swapaxes(1, 2), scaled) / DELTA**2
            good &= np.all(np.isfinite(hessians), axis=(1, 2))
            hessians[~good] = np.eye(self.n_free)
        values[~good], gradients[~good] = np.inf, 0.0
        return _State(vectors, values, gradients, hessians)

    def moved(self, vectors: Floats, steps: Floats) -> Floats:
        """Returns the vectors after steps (laws, free)."""
        return vectors + (steps if self.basis is None else steps @ self.basis)


def minimise(
    objective: Objective,
    starts: Floats,
    weights: Floats | None = None,
    basis: Floats | None = None,
    tolerance: float = 1e-8,
    far: int = 30,
    max_steps: int = 400,
    losses: Floats | None = None,
) -> Optima:
    """Minimises from `starts` (laws, parameters), with `weights` (laws, rows), until gradients are below `tolerance`.

    `losses` (laws, rows) takes the place of the table's losses, for many simulations of one table. `basis` (free, parameters)
    has the directions in which the vectors may change, by default all. `far` is the number of steps of Levenberg and
    Marquardt; 0 for starts that are close to the optimum.
    """
    size = max(1, ENTRIES // len(objective.loss))
    parts = list[Optima]()
    with np.errstate(all="ignore"):  # steps that overflow are rejected
        for first in range(0, len(starts), size):
            part = slice(first, first + size)
            own_weights, own_losses = (None if values is None else values[part] for values in (weights, losses))
            batch = Batch(objective, own_weights, own_losses, basis)
            vectors = starts[part].copy()
            if far:
                vectors = _levenberg(batch, vectors, far)
            parts.append(_bfgs(batch, vectors, tolerance, max_steps))
    return Optima(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("vectors", "values", "gradients")))


def _levenberg(batch: Batch, vectors: Floats, n_steps: int) -> Floats:
    """Takes damped Gauss-Newton steps on reweighted least squares; each is accepted where it lowers the objective."""
    everyone = np.arange(len(vectors))
    now, damping = batch.state(vectors, everyone, hessian=True), np.full(len(vectors), 1e-2)
    diagonal = np.arange(batch.n_free)
    for _ in range(n_steps):
        damped = now.hessians.copy()
        damped[:, diagonal, diagonal] *= 1 + damping[:, None]
        damped[:, diagonal, diagonal] += 1e-12 * (1 + damped[:, diagonal, diagonal].max(axis=1, keepdims=True))
        steps = -_solve(damped, now.gradients)
        steps = np.clip(steps, -3, 3)  # a coordinate is a logarithm or an exponent
        new = batch.state(batch.moved(now.vectors, steps), everyone, hessian=True)
        better = new.values < now.values
        damping = np.where(better, np.maximum(damping / 6, 1e-9), np.minimum(damping * 5, 1e9))
        for name in ("vectors", "values", "gradients", "hessians"):
            getattr(now, name)[better] = getattr(new, name)[better]
    return now.vectors


def _solve(matrices: Floats, right: Floats) -> Floats:
    try:
        return np.asarray(np.linalg.solve(matrices, right[..., None])[..., 0], np.float64)
    except np.linalg.LinAlgError:
        return np.asarray(
            np.matmul(np.linalg.pinv(matrices, rcond=1e-14, hermitian=True), right[..., None])[..., 0], np.float64
        )


def _inverse(matrices: Floats) -> Floats:
    """Returns the inverses of scaled and slightly damped Hessians, as the first inverse Hessians of BFGS."""
    n = np.arange(matrices.shape[1])
    scale = np.sqrt(np.maximum(matrices[:, n, n], 1e-300))
    scaled = matrices / scale[:, :, None] / scale[:, None, :]
    scaled[:, n, n] += 1e-7
    try:
        inverse = np.linalg.inv(scaled)
    except np.linalg.LinAlgError:
        inverse = np.linalg.pinv(scaled, rcond=1e-10, hermitian=True)
    return inverse / scale[:, :, None] / scale[:, None, :]


def _bfgs(batch: Batch, vectors: Floats, tolerance: float, max_steps: int) -> Optima:
    """Minimises by BFGS with a line search that only asks for sufficient decrease; laws that have converged drop out."""
    everyone = np.arange(len(vectors))
    now = batch.state(vectors, everyone, hessian=True)
    inverse = _inverse(now.hessians)
    active = everyone[np.isfinite(now.values) & (np.abs(now.gradients).max(axis=1) > tolerance)]
    fresh = np.zeros(len(vectors), np.intp)  # restarts without progress in between
    for _ in range(max_steps):
        if not len(active):
            break
        slope = now.gradients[active]
        directions = -np.matmul(inverse[active], slope[..., None])[..., 0]
        descent = np.sum(directions * slope, axis=1)
        new, step = _line_search(batch, now, active, directions, descent)
        moved = step > 0
        going = active[moved]
        change = step[moved, None] * directions[moved]
        bend = new.gradients[moved] - now.gradients[going]
        inverse[going] = _updated(inverse[going], change, bend)
        now.vectors[going], now.values[going], now.gradients[going] = (
            new.vectors[moved],
            new.values[moved],
            new.gradients[moved],
        )
        fresh[going] = 0
        stuck = active[~moved]
        fresh[stuck] += 1
        if len(stuck) and np.any(fresh[stuck] < 2):  # perhaps the inverse Hessian is bad: start it again
            again = batch.state(now.vectors[stuck], stuck, hessian=True)
            inverse[stuck] = _inverse(again.hessians)
        active = active[(np.abs(now.gradients[active]).max(axis=1) > tolerance) & (fresh[active] < 2)]
    return Optima(now.vectors, now.values, np.abs(now.gradients).max(axis=1))


def _line_search(
    batch: Batch, now: _State, active: NDArray[np.intp], directions: Floats, descent: Floats
) -> tuple[_State, Floats]:
    """Returns the new states of the active laws and their step lengths; 0 where no step lowers the objective."""
    limit = np.abs(directions).max(axis=1)
    trial = np.minimum(1.0, 2.0 / np.maximum(limit, 1e-300))
    step = np.zeros(len(active))
    new = _State(now.vectors[active], now.values[active], now.gradients[active], now.hessians[:0])
    waiting = np.arange(len(active))
    for _ in range(25):
        rows = active[waiting]
        tried = batch.state(batch.moved(now.vectors[rows], trial[waiting, None] * directions[waiting]), rows, hessian=False)
        lower = tried.values <= now.values[rows] + ARMIJO * trial[waiting] * descent[waiting]
        lower &= tried.values < now.values[rows]
        done = waiting[lower]
        for name in ("vectors", "values", "gradients"):
            getattr(new, name)[done] = getattr(tried, name)[lower]
        step[done] = trial[done]
        rise = tried.values[~lower] - now.values[rows[~lower]]
        waiting = waiting[~lower]
        if not len(waiting):
            break
        t, d = trial[waiting], descent[waiting]
        best = -d * t / (2 * np.maximum(rise / np.maximum(t, 1e-300) - d, 1e-300))  # minimum of the parabola
        trial[waiting] = np.clip(np.where(np.isfinite(best), best, 0.1 * t), 0.1 * t, 0.5 * t)
    return new, step


def _updated(inverse: Floats, change: Floats, bend: Floats) -> Floats:
    """Returns the inverse Hessians after the update of BFGS, unchanged where the curvature is not positive."""
    curvature = np.sum(change * bend, axis=1)
    valid = curvature > 1e-12 * np.linalg.norm(change, axis=1) * np.linalg.norm(bend, axis=1)
    rho = np.where(valid, 1 / np.where(valid, curvature, 1), 0)[:, None, None]
    left = np.eye(change.shape[1]) - rho * change[:, :, None] * bend[:, None, :]
    updated = left @ inverse @ left.swapaxes(1, 2) + rho * change[:, :, None] * change[:, None, :]
    return np.where(valid[:, None, None], updated, inverse)
