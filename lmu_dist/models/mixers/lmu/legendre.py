"""The frozen Legendre memory in float64 numpy: state-space matrices and impulse response of an order and a window.

Everything is computed once on the CPU and cast last; nothing is trained. Called by mixer, chunked and fourier.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy.linalg import expm, solve_discrete_lyapunov


def continuous_matrices(order: int, theta_tokens: float) -> tuple[Float[np.ndarray, "Q Q"], Float[np.ndarray, "Q"]]:
    """State-space matrices A (Q, Q) and B (Q,) of the sliding window, per token of time (Voelker et al. 2019, eq. 2-3)."""
    i = np.arange(order)
    scale = (2.0 * i + 1.0) / theta_tokens
    sign = np.where(i[:, None] < i[None, :], -1.0, (-1.0) ** (i[:, None] - i[None, :] + 1))
    return scale[:, None] * sign, scale * (-1.0) ** i


def discrete_matrices(order: int, theta_tokens: float) -> tuple[Float[np.ndarray, "Q Q"], Float[np.ndarray, "Q"]]:
    """Zero-order hold with a step of one token: Abar = e^A (Q, Q), Bbar = A^-1 (e^A - I) B (Q,).

    Both are blocks of one matrix exponential, which needs no inverse of A.
    """
    a, b = continuous_matrices(order, theta_tokens)
    augmented = np.zeros((order + 1, order + 1))
    augmented[:order, :order], augmented[:order, order] = a, b
    e = expm(augmented)
    return e[:order, :order], e[:order, order]


def impulse_response(order: int, theta_tokens: float, length: int) -> Float[np.ndarray, "Q T"]:
    """H = [Bbar, Abar Bbar, Abar^2 Bbar, ...] (Q, length), by doubling: log2(length) matrix products."""
    a_bar, b_bar = discrete_matrices(order, theta_tokens)
    h = b_bar[:, None]
    power = a_bar
    while h.shape[1] < length:
        h = np.concatenate([h, power @ h], axis=1)
        power = power @ power
    return h[:, :length]


@lru_cache(maxsize=256)
def memory_tokens(order: int, theta_tokens: float) -> int:
    """Number of tokens after which the memory has forgotten an input.

    What is left of it is then below 1e-9 of all it contributes, far below float32's rounding. The result is about two windows
    for high orders and about twenty for order 1.
    """
    a_bar, b_bar = discrete_matrices(order, theta_tokens)
    step = max(1, round(theta_tokens / 8))
    power, scale = np.linalg.matrix_power(a_bar, step), row_scale(order, theta_tokens)
    response, tokens = power @ b_bar, step
    # In units of the row scale, the squared norm of the whole impulse response is `order`.
    while np.linalg.norm(response / scale) * np.sqrt(theta_tokens) > 1e-9 * np.sqrt(order):
        response, tokens = power @ response, tokens + step
    return tokens


def row_scale(order: int, theta_tokens: float) -> Float[np.ndarray, "Q"]:
    """Standard deviation of each memory row under white noise of unit variance (Q,): the root of the Gramian's diagonal.

    It is about sqrt((2i+1)/theta) for low orders i and less for orders that oscillate faster than tokens arrive. Memory rows
    divided by it have equal variance. In this basis projections are trained and recurrences run in float32.
    """
    a_bar, b_bar = discrete_matrices(order, theta_tokens)
    gramian = solve_discrete_lyapunov(a_bar, np.outer(b_bar, b_bar))
    # A row of an order far above theta is a linear combination of the others. Rounding must not make its variance 0 or less.
    return np.sqrt(np.maximum(np.diag(gramian), 1e-12))
