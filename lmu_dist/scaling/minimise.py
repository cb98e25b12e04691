"""Minimises the objective from many starts, or for many weights or losses, at once: arrays of vectors in, of optima out.

First a few steps of Levenberg and Marquardt on reweighted least squares, which find the valley from far away; then BFGS,
which converges in it. All laws take their steps together, so numpy's overhead is paid once for all of them.
"""

from dataclasses import dataclass
from typing import Any

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

    def of(self, which: NDArray[Any]) -> "_State":
        """Returns a copy of the states of some laws, without their Hessians."""
        return _State(self.vectors[which], self.values[which], self.gradients[which], self.hessians[:0])

    def put(self, which: NDArray[Any], states: "_State") -> None:
        """Replaces the states of some laws, but for their Hessians."""
        self.vectors[which], self.values[which], self.gradients[which] = states.vectors, states.values, states.gradients


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
        weights = 1.0 if self.weights is None else self.weights[which]
        values = np.add.reduce(weights * self.objective.row_values(residuals), axis=1) / DELTA**2
        slopes = weights * self.objective.slopes(residuals)
        gradients = np.matmul(slopes[:, None, :], jacobian)[:, 0] / DELTA**2
        good = np.isfinite(values) & np.isfinite(gradients).all(axis=1)
        hessians = np.empty((0, self.n_free, self.n_free))
        if hessian:
            scaled = jacobian * (weights * self.objective.curvatures(residuals))[..., None]
            hessians = np.matmul(jacobian.swapaxes(1, 2), scaled) / DELTA**2
            good &= np.all(np.isfinite(hessians), axis=(1, 2))
            hessians[~good] = np.eye(self.n_free)
        if not good.all():
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
    found = batch.state(vectors, np.arange(len(vectors)), hessian=True)
    active = np.flatnonzero(np.isfinite(found.values) & (np.abs(found.gradients).max(axis=1) > tolerance))
    now, inverse = found.of(active), _inverse(found.hessians)[active]
    fresh = np.zeros(len(active), np.intp)  # restarts without progress in between
    for _ in range(max_steps):
        if not len(active):
            break
        directions = -np.matmul(inverse, now.gradients[..., None])[..., 0]
        descent = np.add.reduce(directions * now.gradients, axis=1)
        new, step = _line_search(batch, now, active, directions, descent)
        change, bend = step[:, None] * directions, new.gradients - now.gradients
        stuck = np.flatnonzero(step == 0)
        fresh = (fresh + 1) * (step == 0)
        # A law that is stuck has not changed, and so keeps its inverse; perhaps that is bad: start it again.
        inverse, now = _updated(inverse, change, bend), new
        if len(stuck) and np.any(fresh[stuck] < 2):
            inverse[stuck] = _inverse(batch.state(now.vectors[stuck], active[stuck], hessian=True).hessians)
        going = (np.abs(now.gradients).max(axis=1) > tolerance) & (fresh < 2)
        if not going.all():
            found.put(active[~going], now.of(~going))
            active, now, inverse, fresh = active[going], now.of(going), inverse[going], fresh[going]
    found.put(active, now)
    return Optima(found.vectors, found.values, np.abs(found.gradients).max(axis=1))


def _line_search(
    batch: Batch, now: _State, active: NDArray[np.intp], directions: Floats, descent: Floats
) -> tuple[_State, Floats]:
    """Returns the new states of the active laws and their step lengths; 0 where no step lowers the objective."""
    limit = np.abs(directions).max(axis=1)
    trial = np.minimum(1.0, 2.0 / np.maximum(limit, 1e-300))
    new, step, waiting = now, np.zeros(len(active)), np.arange(len(active))
    for attempt in range(25):
        which = waiting if attempt else slice(None)
        tried = batch.state(
            batch.moved(now.vectors[which], trial[which, None] * directions[which]), active[which], hessian=False
        )
        lower = tried.values <= now.values[which] + ARMIJO * trial[which] * descent[which]
        lower &= tried.values < now.values[which]
        if not attempt:
            if lower.all():
                return tried, trial
            new = now.of(waiting)
        new.put(waiting[lower], tried.of(lower))
        step[waiting[lower]] = trial[waiting[lower]]
        rise = tried.values[~lower] - now.values[waiting[~lower]]
        waiting = waiting[~lower]
        if not len(waiting):
            break
        t, d = trial[waiting], descent[waiting]
        best = -d * t / (2 * np.maximum(rise / np.maximum(t, 1e-300) - d, 1e-300))  # minimum of the parabola
        trial[waiting] = np.clip(np.where(np.isfinite(best), best, 0.1 * t), 0.1 * t, 0.5 * t)
    return new, step


def _updated(inverse: Floats, change: Floats, bend: Floats) -> Floats:
    """Returns the inverse Hessians after the update of BFGS, unchanged where the curvature is not positive."""
    curvature = np.add.reduce(change * bend, axis=1)
    sizes = np.sqrt(np.add.reduce(change * change, axis=1)) * np.sqrt(np.add.reduce(bend * bend, axis=1))
    valid = curvature > 1e-12 * sizes
    rho = np.where(valid, 1 / np.where(valid, curvature, 1), 0)[:, None, None]
    left = np.eye(change.shape[1]) - rho * change[:, :, None] * bend[:, None, :]
    updated = left @ inverse @ left.swapaxes(1, 2) + rho * change[:, :, None] * change[:, None, :]
    return np.where(valid[:, None, None], updated, inverse)
