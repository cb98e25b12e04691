"""Noise that runs of one group have in common: fits with their tables and groups in, the parts of the noise out.

Runs of one trunk share its seed and most of its steps, so their errors are not independent. A bootstrap over whole trunks needs
many of them. With few, runs are resampled one by one, and the spread of the laws is made that of the two parts of the noise.
Called by intervals, and by planning/learn, so that a report and `ladder.until` mean the same intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from lmu_dist.scaling.fit import Fit
from lmu_dist.scaling.laws import Floats, ScalingLaw
from lmu_dist.scaling.objective import DELTA, Objective, log_residuals
from lmu_dist.scaling.table import Rows

MIN_GROUPS = 20  # that are resampled as a whole; intervals from fewer would be up to 2.5 times too wide, and misfits go unseen
MAX_CONDITION = 1e6  # of the equations for the two parts of the noise


@dataclass(frozen=True)
class Noise:
    """The standard deviation of ln L between runs, and the share of its square that runs of a group have in common.

    `pooled` is the standard deviation that residuals show if nothing is common.
    """

    deviation: float
    shared: float
    pooled: float


def find_noise(tables: Sequence[tuple[Fit, Rows, Sequence[str]]]) -> Noise:
    """Returns the noise of fits to tables (fit, rows, group of every row), pooled over them.

    Two sums of squares, of residuals and of their sums by group, are set equal to what they are expected to be (MINQUE, Rao
    1971). The expectations account for the parameters that were fitted.
    """
    left, right = np.zeros((2, 2)), np.zeros(2)
    for fit, rows, labels in tables:
        basis = orthonormal(_jacobian(fit, rows))
        kept = np.eye(len(rows)) - basis @ basis.T
        together, residuals = _together(labels), log_residuals(fit.law, rows)
        right += [residuals @ residuals, residuals @ together @ residuals]
        of_group = kept @ together
        left += [[np.trace(kept), np.trace(of_group)], [np.trace(of_group), np.trace(of_group @ of_group)]]
    pooled = float(np.sqrt(right[0] / left[0, 0]))  # without a common part
    if np.linalg.cond(left) > MAX_CONDITION:  # no group has two runs
        return Noise(pooled, 0.0, pooled)
    own, common = np.linalg.solve(left, right)
    if common <= 0:
        return Noise(pooled, 0.0, pooled)
    total = max(own, 0.0) + common
    return Noise(max(float(np.sqrt(total)), pooled), float(common / total), pooled)


def with_shared_noise(laws: Sequence[ScalingLaw], fit: Fit, rows: Rows, labels: Sequence[str]) -> list[ScalingLaw]:
    """Returns the laws of resamples of single runs with the spread that the noise of groups gives them.

    The deviations of their coordinates from the fit are multiplied by a matrix, the nearest one to 1 that turns the covariance
    for independent errors into that for errors with a common part (the optimal transport between two normal distributions).
    """
    noise = find_noise([(fit, rows, labels)])
    if not laws or noise.shared == 0:
        return list(laws)
    basis, objective = fit.constraints.basis(type(fit.law)), Objective(type(fit.law), rows)
    jacobian = _jacobian(fit, rows)
    inverse = np.linalg.inv(jacobian.T @ jacobian)
    common = noise.shared / huber_loss_of_precision(noise.deviation) ** 2
    together = (1 - common) * np.eye(len(rows)) + common * _together(labels)
    wanted = (noise.deviation / noise.pooled) ** 2 * inverse @ jacobian.T @ together @ jacobian @ inverse
    root = _root(inverse)
    matrix = np.linalg.solve(root, np.linalg.solve(root, _root(root @ wanted @ root)).T).T
    here = objective.vector(fit.law)
    # Directions are orthogonal rows of zeros and ones, so their products with a vector are sums of tied coordinates.
    of_directions = basis / basis.sum(axis=1, keepdims=True)
    moved = list[ScalingLaw]()
    for law in laws:
        change = objective.vector(law) - here
        step = of_directions @ change
        moved.append(objective.law(here + change + (matrix @ step - step) @ basis))
    return moved


def whitening(fit: Fit, rows: Rows, labels: Sequence[str]) -> tuple[Floats, Floats]:
    """Returns the matrix (runs, runs) that makes the noise of runs independent, and its inverse."""
    shared = min(find_noise([(fit, rows, labels)]).shared, 1 - 1e-3)
    values, vectors = np.linalg.eigh((1 - shared) * np.eye(len(rows)) + shared * _together(labels))
    root = np.sqrt(values)
    return np.asarray(vectors / root @ vectors.T), np.asarray(vectors * root @ vectors.T)


def huber_loss_of_precision(noise: float) -> float:
    """Returns how many times as wide the error of the Huber fit is as that of least squares, for normal noise of ln L.

    sqrt(E[psi^2]) / E[psi'] with psi clipped at DELTA, in units of the noise (Huber 1964).
    """
    k = DELTA / noise
    inside, density = 2 * ndtr(k) - 1, np.exp(-(k**2) / 2) / np.sqrt(2 * np.pi)
    squared = inside - 2 * k * density + 2 * k**2 * ndtr(-k)
    return float(np.sqrt(squared) / inside)


def orthonormal(columns: Floats) -> Floats:
    """Returns orthonormal columns that span the same space (rows, rank), whatever the scales of the columns.

    Columns of zeros count for nothing: the derivatives by a prefactor that the fit found to be zero, and by its exponent.
    """
    left, values, _ = np.linalg.svd(columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300), full_matrices=False)
    return left[:, values > 1e-8 * values[0]]


def _jacobian(fit: Fit, rows: Rows) -> Floats:
    """Returns the derivatives of ln L by the free coordinates, (runs, free)."""
    objective = Objective(type(fit.law), rows)
    with np.errstate(divide="ignore"):  # the logarithm of a prefactor that is zero
        vector = objective.vector(fit.law)
    return objective.residuals_and_jacobian(vector)[1] @ fit.constraints.basis(type(fit.law)).T


def _together(labels: Sequence[str]) -> Floats:
    """Returns a matrix (runs, runs) that is 1 for runs of one group and 0 otherwise."""
    names = np.array(list(labels))
    return np.asarray(names[:, None] == names[None, :], np.float64)


def _root(matrix: NDArray[np.floating]) -> Floats:
    """Returns the square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T)
