"""Scaling laws as functions: sizes and tokens in, loss in nats out. Legend: N parameters, D tokens, L nats per token."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats (Hoffmann et al. 2022, arXiv 2203.15556, approach 3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n_params: ArrayLike, tokens: ArrayLike) -> Floats:
        """Predicted loss in nats."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    def tokens_for(self, loss: ArrayLike, n_params: ArrayLike) -> Floats:
        """Tokens after which a model of a size has a loss; nan at or below the floor E + A / N^alpha."""
        n = np.asarray(n_params, np.float64)
        above = np.asarray(loss, np.float64) - self.E - self.A * n**-self.alpha
        return np.asarray((self.B / np.where(above > 0, above, np.nan)) ** (1 / self.beta))
