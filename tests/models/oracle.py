"""Independent float64 reference of the LMU (arXiv 2110.02402, eq. 1-10), slow and literal, in numpy and scipy only."""

import numpy as np
from scipy.linalg import expm
from scipy.special import erf


def lmu_block(x: np.ndarray, theta: float, projection: np.ndarray, bias: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
    """Memory M (B, T, Q, D) and out (B, T, D) from x (B, T, D), projection (3R, Q), bias (3R,) and p (R,), token by token."""
    order, rows = projection.shape[1], len(p)
    i = np.arange(order)
    lower = (-1.0) ** (i[:, None] - i[None, :] + 1)
    a = (2 * i[:, None] + 1) / theta * np.where(i[:, None] < i[None, :], -1.0, lower)
    b = (2 * i + 1) * (-1.0) ** i / theta
    a_bar = expm(a)
    b_bar = np.linalg.solve(a, (a_bar - np.eye(order)) @ b)
    memory = np.zeros((x.shape[0], x.shape[1], order, x.shape[2]))
    state = np.zeros((x.shape[0], order, x.shape[2]))
    for t in range(x.shape[1]):
        state = a_bar @ state + b_bar[:, None] * x[:, t, None]
        memory[:, t] = state
    z = projection @ memory + bias[:, None]
    q, k, v = np.split(0.5 * z * (1 + erf(z / np.sqrt(2))), 3, axis=2)
    assert q.shape[2] == rows
    scores = q @ np.swapaxes(k, -1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return {"M": memory, "out": np.einsum("r,btrd->btd", p, weights @ v)}
