"""Tests whether loss is a power law in N, the paper's first claim: losses at one budget in, exponent and interval out."""

from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling.intervals import CONFIDENCE, Interval
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.misfit import SIGNIFICANCE
from lmu_dist.scaling.published import PowerLaw
from lmu_dist.scaling.quantiles import t_quantile

MIN_SIZES = 4


@dataclass(frozen=True)
class SizeLaw:
    """The power law L = (scale/N)^exponent of a family at one budget, fitted by least squares of ln L.

    With fewer than four sizes there is no law, and `remark` says so. `bends`: a parabola in ln N fits better than the line; its
    quadratic coefficient differs from zero with p below 0.01, which happens to one exact power law in a hundred.
    """

    family: str
    tokens: int
    n_sizes: int
    law: PowerLaw | None
    interval: Interval | None
    worst_residual: float | None  # relative
    bends: bool | None
    remark: str


def fit_power_law(family: str, tokens: int, n_params: Floats, loss: Floats) -> SizeLaw:
    """Fits the power law to the mean loss at each size."""
    count = len(n_params)
    if count < MIN_SIZES:
        return SizeLaw(family, tokens, count, None, None, None, None, f"{count} sizes; the test needs at least {MIN_SIZES}")
    x, y = np.log(n_params) - np.log(n_params).mean(), np.log(loss)
    (slope, offset), residual, slope_error = _regress(np.stack([x, np.ones(count)], axis=1), y)
    exponent = -slope
    reach = t_quantile((1 + CONFIDENCE) / 2, count - 2) * slope_error
    (bend, *_), _, bend_error = _regress(np.stack([x**2, x, np.ones(count)], axis=1), y)
    bends = abs(bend) > t_quantile(1 - SIGNIFICANCE / 2, count - 3) * bend_error
    scale = float(np.exp(np.log(n_params).mean() + offset / exponent)) if exponent else float("inf")
    law = PowerLaw(scale, float(exponent))
    interval = (float(exponent - reach), float(exponent + reach))
    return SizeLaw(family, tokens, count, law, interval, float(np.abs(np.expm1(residual)).max()), bool(bends), "")


def _regress(columns: Floats, y: Floats) -> tuple[Floats, Floats, float]:
    """Returns the coefficients, the residuals, and the standard error of the first coefficient."""
    coefficients: Floats = np.asarray(np.linalg.lstsq(columns, y, rcond=None)[0], np.float64)
    residual = y - columns @ coefficients
    variance = float(residual @ residual) / (len(y) - columns.shape[1])
    return coefficients, residual, float(np.sqrt(variance * np.linalg.inv(columns.T @ columns)[0, 0]))
