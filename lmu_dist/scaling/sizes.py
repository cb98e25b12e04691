"""The paper's first claim: is loss a power law in N? Losses of a family at one budget in, exponent and its interval out."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as t_distribution

from lmu_dist.scaling.intervals import LEVEL, Interval
from lmu_dist.scaling.laws import Floats, PowerLaw

FEWEST_SIZES = 4


@dataclass(frozen=True)
class InSize:
    """L = (scale/N)^exponent of a family at one budget, by least squares of ln L; None and why for fewer than four sizes.

    `bends` says that a curve fits better than the line: the second difference in ln N is told from zero at 90 %.
    """

    family: str
    tokens: int
    n_sizes: int
    law: PowerLaw | None
    interval: Interval | None
    worst_residual: float | None  # relative
    bends: bool | None
    remark: str


def power_law(family: str, tokens: int, n_params: Floats, loss: Floats) -> InSize:
    """From the mean loss at each size."""
    count = len(n_params)
    if count < FEWEST_SIZES:
        return InSize(
            family, tokens, count, None, None, None, None, f"{count} sizes; a line that could miss needs {FEWEST_SIZES}"
        )
    x, y = np.log(n_params) - np.log(n_params).mean(), np.log(loss)
    (slope, offset), residual, slope_error = _regress(np.stack([x, np.ones(count)], axis=1), y)
    exponent = -slope
    reach = float(t_distribution.ppf((1 + LEVEL) / 2, count - 2)) * slope_error
    (bend, *_), _, bend_error = _regress(np.stack([x**2, x, np.ones(count)], axis=1), y)
    bends = abs(bend) > t_distribution.ppf((1 + LEVEL) / 2, count - 3) * bend_error
    scale = float(np.exp(np.log(n_params).mean() + offset / exponent)) if exponent else float("inf")
    law = PowerLaw(scale, float(exponent))
    interval = (float(exponent - reach), float(exponent + reach))
    return InSize(family, tokens, count, law, interval, float(np.abs(np.expm1(residual)).max()), bool(bends), "")


def _regress(columns: Floats, y: Floats) -> tuple[Floats, Floats, float]:
    """Coefficients, residuals, and the standard error of the first coefficient."""
    found: Floats = np.asarray(np.linalg.lstsq(columns, y, rcond=None)[0], np.float64)
    residual = y - columns @ found
    variance = float(residual @ residual) / (len(y) - columns.shape[1])
    return found, residual, float(np.sqrt(variance * np.linalg.inv(columns.T @ columns)[0, 0]))
