"""What a fit minimises: the sum of Huber losses of ln L, for one parameter vector or for many at once.

`fit` uses it for single fits, `minimise` for the starts and resamples of a law together.
"""

import numpy as np

from lmu_dist.scaling.laws import Floats, ScalingLaw
from lmu_dist.scaling.table import Rows

DELTA = 1e-3  # residual of ln L at which the Huber loss changes from quadratic to linear


def losses(law: ScalingLaw, rows: Rows) -> Floats:
    """Returns the predicted loss of every row, in nats."""
    return law.loss(rows.n_params, rows.tokens, rows.unique_tokens if law.NEEDS_UNIQUE else None)


def log_residuals(law: ScalingLaw, rows: Rows) -> Floats:
    """Returns ln(predicted loss) - ln(measured loss) of every row."""
    return np.log(losses(law, rows)) - np.log(rows.loss)


def huber(residuals: Floats) -> Floats:
    """Returns the Huber loss of every residual, with threshold DELTA."""
    size = np.abs(residuals)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))


def unit_of_loss(rows: Rows) -> float:
    """Returns the geometric mean of the loss, by which errors of L are divided so that tolerances do not depend on its unit."""
    return float(np.exp(np.log(rows.loss).mean()))


class Objective:
    """The objective as a function of a law's coordinates, with N and D in the units that the law asks for.

    With plain units, exponents and prefactors would be almost perfectly correlated. Vectors are (parameters) or
    (laws, parameters); results have the same leading axis. Values and gradients are in units of DELTA^2, so of order one.
    With `always_huber` a law with LEAST_SQUARES has Huber losses of ln L too, so that it can be compared with the others.
    """

    def __init__(self, form: type[ScalingLaw], rows: Rows, always_huber: bool = False) -> None:
        self.form, self.least_squares = form, form.LEAST_SQUARES and not always_huber
        self.units = form.units(rows.n_params, rows.tokens)
        self.unit_of_loss = unit_of_loss(rows)
        self.n, self.d, self.loss = rows.n_params / self.units[0], rows.tokens / self.units[1], rows.loss
        unique = rows.unique_tokens if rows.unique_tokens is not None else rows.tokens
        self.unique = unique / self.units[1] if form.NEEDS_UNIQUE else None

    def vector(self, law: ScalingLaw) -> Floats:
        """Returns the coordinates of a law given in plain units."""
        return law.rescaled(1 / self.units[0], 1 / self.units[1]).coordinates()

    def law(self, vector: Floats) -> ScalingLaw:
        """Returns the law of a vector, in plain units."""
        return self.form.from_coordinates(vector).rescaled(*self.units)

    def residuals(self, vector: Floats) -> Floats:
        """Returns the residual of every row: of ln L, or of L in units of its geometric mean."""
        loss = self.form.from_coordinates(vector).loss(self.n, self.d, self.unique)
        return (loss - self.loss) / self.unit_of_loss if self.least_squares else np.log(loss / self.loss)

    def residuals_and_jacobian(self, vector: Floats, measured: Floats | None = None) -> tuple[Floats, Floats]:
        """Returns the residuals (.., rows) and their Jacobian (.., rows, parameters).

        `measured` (.., rows) takes the place of the table's losses.
        """
        measured = self.loss if measured is None else measured
        law = self.form.from_coordinates(vector)
        loss = law.loss(self.n, self.d, self.unique)
        jacobian = law.coordinate_gradient(self.n, self.d, self.unique)
        if self.least_squares:
            return (loss - measured) / self.unit_of_loss, jacobian / self.unit_of_loss
        return np.log(loss / measured), jacobian / loss[..., None]

    def row_values(self, residuals: Floats) -> Floats:
        """Returns the objective of every residual, not divided by DELTA^2."""
        return 0.5 * residuals**2 if self.least_squares else huber(residuals)

    def slopes(self, residuals: Floats) -> Floats:
        """Returns the derivative of `row_values`."""
        if self.least_squares:
            return residuals
        return np.minimum(np.maximum(residuals, -DELTA), DELTA)  # in two thirds of np.clip's time

    def curvatures(self, residuals: Floats) -> Floats:
        """Returns slope over residual: the weights of iteratively reweighted least squares, at most 1."""
        return np.ones_like(residuals) if self.least_squares else DELTA / np.maximum(np.abs(residuals), DELTA)
