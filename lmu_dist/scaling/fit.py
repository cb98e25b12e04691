"""Fitting: a table of sizes, tokens and losses in, a law out. Minimises the sum of Huber terms of ln L, as in the replication
of Chinchilla by Besiroglu et al. 2024 (arXiv 2404.10102), from a start found by variable projection.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from lmu_dist.scaling.laws import Chinchilla, Floats

DELTA = 1e-3  # where the Huber term turns from a square to a line, in ln nats
EXPONENTS = np.linspace(0.05, 1.2, 24)  # the grid of alpha and of beta from which the search starts


@dataclass(frozen=True)
class Fit:
    """A law, the objective it reached, and the largest component of the gradient there."""

    law: Chinchilla
    objective: float
    gradient: float


def fit_chinchilla(n_params: Floats, tokens: Floats, loss: Floats, start: Chinchilla | None = None) -> Fit:
    """The Chinchilla law of a table, by log-Huber least squares; `start` saves the search for one.

    Raises ValueError for fewer than 6 rows, or a number that is not positive.
    """
    n, d, y = (np.asarray(v, np.float64) for v in (n_params, tokens, loss))
    if len(n) < 6:
        raise ValueError(f"a law of five parameters needs at least 6 runs, not {len(n)}")
    if not (np.all(n > 0) and np.all(d > 0) and np.all(y > 0) and np.all(np.isfinite(y))):
        raise ValueError("sizes, tokens and losses must be positive numbers")
    # Centred, so that the exponents and the prefactors are not one and the same direction.
    x_n, x_d = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()
    law = start or _project(n, d, y)
    first = np.array(
        [
            np.log(law.A) - law.alpha * np.log(n).mean(),
            np.log(law.B) - law.beta * np.log(d).mean(),
            np.log(law.E),
            law.alpha,
            law.beta,
        ]
    )

    def objective(p: Floats) -> tuple[float, Floats]:
        terms = np.stack([p[0] - p[3] * x_n, p[1] - p[4] * x_d, np.full_like(x_n, p[2])])
        predicted = logsumexp(terms, axis=0)
        residual = predicted - np.log(y)
        small = np.abs(residual) <= DELTA
        value = np.where(small, 0.5 * residual**2, DELTA * (np.abs(residual) - 0.5 * DELTA)).sum()
        slope = np.where(small, residual, DELTA * np.sign(residual))
        share = np.exp(terms - predicted) * slope
        gradient = np.array([share[0].sum(), share[1].sum(), share[2].sum(), -(share[0] * x_n).sum(), -(share[1] * x_d).sum()])
        # In units of the turning point squared: tolerances of the optimiser are made for values around one.
        return float(value / DELTA**2), gradient / DELTA**2

    best = minimize(objective, first, jac=True, method="BFGS", options={"gtol": 1e-7, "maxiter": 2000})
    a, b, e, alpha, beta = best.x
    law = Chinchilla(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * np.log(n).mean())),
        B=float(np.exp(b + beta * np.log(d).mean())),
        alpha=float(alpha),
        beta=float(beta),
    )
    return Fit(law, float(best.fun) * DELTA**2, float(np.abs(objective(best.x)[1]).max()) * DELTA**2)


def _project(n: Floats, d: Floats, y: Floats) -> Chinchilla:
    """A start: for given exponents the loss is linear in E, A and B, so only the exponents are searched, on a grid."""
    best, found = np.inf, Chinchilla(float(y.min()) / 2, 1.0, 1.0, 0.3, 0.3)
    for alpha in EXPONENTS:
        for beta in EXPONENTS:
            columns = np.stack([np.ones_like(n), (n / n.mean()) ** -alpha, (d / d.mean()) ** -beta], axis=1)
            weights, *_ = np.linalg.lstsq(columns / y[:, None], np.ones_like(y), rcond=None)
            if np.any(weights <= 0):
                continue
            error = float(np.square(columns @ weights / y - 1).sum())
            if error < best:
                e, a, b = (float(w) for w in weights)
                best, found = error, Chinchilla(e, a * n.mean() ** alpha, b * d.mean() ** beta, float(alpha), float(beta))
    return found
