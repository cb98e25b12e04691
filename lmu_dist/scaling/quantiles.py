"""Quantiles and tails of the distributions behind intervals and tests, by scipy.special.

scipy.stats, which computes the same numbers, takes 0.3 s to import: each driver, report and test process would wait for it.
"""

from scipy.special import chdtri, fdtrc, fdtri, ndtri, stdtrit


def normal_quantile(p: float) -> float:
    """Returns the number below which a standard normal value is with probability p."""
    return float(ndtri(p))


def t_quantile(p: float, freedom: float) -> float:
    """Returns the number below which a value of Student's t with `freedom` degrees of freedom is with probability p."""
    return float(stdtrit(freedom, p))


def chi_squared_median(freedom: float) -> float:
    """Returns the median of the chi-squared distribution with `freedom` degrees of freedom."""
    return float(chdtri(freedom, 0.5))


def f_quantile(p: float, numerator_freedom: float, denominator_freedom: float) -> float:
    """Returns the number below which a value of the F distribution with these degrees of freedom is with probability p."""
    return float(fdtri(numerator_freedom, denominator_freedom, p))


def f_survival(x: float, numerator_freedom: float, denominator_freedom: float) -> float:
    """Returns the probability that a value of the F distribution with these degrees of freedom exceeds x."""
    return float(fdtrc(numerator_freedom, denominator_freedom, x))
