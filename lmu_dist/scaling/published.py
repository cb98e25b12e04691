"""Laws with the parameters that papers give, and forms that are never fitted: Kaplan's with steps, curves over one variable.

Symbols: N parameters, D training tokens, S optimizer steps, B batch in tokens, C training FLOPs, L loss in nats per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from lmu_dist.scaling.laws import Chinchilla, Floats, Kaplan


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return cast(float, brentq(function, low, high, xtol=1e-13))


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = (scale/x)^exponent: Kaplan's L(N) and L(D), and the paper's curves."""

    scale: float
    exponent: float

    def loss(self, x: ArrayLike) -> Floats:
        """Returns the predicted loss in nats."""
        return np.asarray((self.scale / np.asarray(x, np.float64)) ** self.exponent)

    def gradient(self, x: ArrayLike) -> Floats:
        """Returns dL/d(scale, exponent), (rows, 2)."""
        loss = self.loss(x)
        return np.stack([self.exponent * loss / self.scale, loss * np.log(self.scale / np.asarray(x, np.float64))], axis=-1)

    def x_for(self, loss: ArrayLike) -> Floats:
        """Returns the N (or D) at which the law has the given loss."""
        return np.asarray(self.scale * np.asarray(loss, np.float64) ** (-1 / self.exponent))


@dataclass(frozen=True)
class CriticalBatch:
    """B_crit(L) = B_star / L^(1/alpha_B) tokens: the batch that needs twice the minimum of steps and of tokens.

    Kaplan et al. 2020, section 5.1.
    """

    B_star: float
    alpha_B: float

    def tokens(self, loss: ArrayLike) -> Floats:
        """Returns B_crit in tokens."""
        return np.asarray(self.B_star * np.asarray(loss, np.float64) ** (-1 / self.alpha_B))

    def s_min(self, steps: ArrayLike, batch_tokens: ArrayLike, loss: ArrayLike) -> Floats:
        """Returns S_min = S / (1 + B_crit/B): the steps that a much larger batch would need for the same loss."""
        return np.asarray(np.asarray(steps) / (1 + self.tokens(loss) / np.asarray(batch_tokens)))

    def c_min(self, flops: ArrayLike, batch_tokens: ArrayLike, loss: ArrayLike) -> Floats:
        """Returns C_min = C / (1 + B/B_crit): the FLOPs that a much smaller batch would need for the same loss."""
        return np.asarray(np.asarray(flops) / (1 + np.asarray(batch_tokens) / self.tokens(loss)))


@dataclass(frozen=True)
class KaplanSteps:
    """L(N, S_min) = (N_c/N)^alpha_N + (S_c/S_min)^alpha_S (Kaplan et al. 2020, eq. 1.6); its data exclude warm-up."""

    N_c: float
    S_c: float
    alpha_N: float
    alpha_S: float

    def loss(self, n_params: ArrayLike, s_min: ArrayLike) -> Floats:
        """Returns the predicted loss in nats."""
        n, s = np.asarray(n_params, np.float64), np.asarray(s_min, np.float64)
        return np.asarray((self.N_c / n) ** self.alpha_N + (self.S_c / s) ** self.alpha_S)

    def gradient(self, n_params: ArrayLike, s_min: ArrayLike) -> Floats:
        """Returns dL/d(N_c, S_c, alpha_N, alpha_S)."""
        n, s = np.broadcast_arrays(np.asarray(n_params, np.float64), np.asarray(s_min, np.float64))
        of_n, of_s = (self.N_c / n) ** self.alpha_N, (self.S_c / s) ** self.alpha_S
        columns = [self.alpha_N * of_n / self.N_c, self.alpha_S * of_s / self.S_c]
        return np.stack([*columns, of_n * np.log(self.N_c / n), of_s * np.log(self.S_c / s)], axis=-1)

    def loss_after(self, n_params: float, steps: float, batch_tokens: float, critical: CriticalBatch) -> float:
        """Returns the loss after S steps at batch B. S_min depends on the loss itself, so this is the unique fixed point.

        If the assumed loss rises, B_crit falls, S_min rises and the predicted loss falls: the two cross exactly once.
        """

        def excess(log_loss: float) -> float:
            assumed = np.exp(log_loss)
            return float(self.loss(n_params, critical.s_min(steps, batch_tokens, assumed)) - assumed)

        return float(np.exp(_root(excess, np.log(1e-3), np.log(1e4))))

    def optimum(self, c_min: float, critical: CriticalBatch) -> tuple[float, float]:
        """Returns the (N, S_min) of lowest loss at C_min = 6 N B_crit(L) S_min FLOPs (Kaplan, appendix B).

        At the optimum the second term is alpha_N/alpha_S times the first, so all terms are powers of N, and N one of C_min.
        """

        def steps(log_n: float) -> float:
            of_n = (self.N_c / np.exp(log_n)) ** self.alpha_N
            return float(self.S_c * (self.alpha_N / self.alpha_S * of_n) ** (-1 / self.alpha_S))

        def excess(log_n: float) -> float:
            return float(
                np.log(6 * steps(log_n) * critical.tokens(self.loss(np.exp(log_n), steps(log_n)))) + log_n - np.log(c_min)
            )

        log_n = _root(excess, -50.0, 150.0)
        return float(np.exp(log_n)), steps(log_n)

    def compute_exponent(self, critical: CriticalBatch) -> float:
        """Returns the exponent of L in C_min at the optimum: 1 / (1/alpha_S + 1/alpha_B + 1/alpha_N)."""
        return 1 / (1 / self.alpha_S + 1 / critical.alpha_B + 1 / self.alpha_N)


# Kaplan et al. 2020, as published. N without embeddings.
KAPLAN_N, KAPLAN_D = PowerLaw(8.8e13, 0.076), PowerLaw(5.4e13, 0.095)
KAPLAN_ND = Kaplan(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)
KAPLAN_NS, KAPLAN_BATCH = KaplanSteps(N_c=6.5e13, S_c=2.1e3, alpha_N=0.077, alpha_S=0.76), CriticalBatch(2.1e8, 0.21)
# Hoffmann et al. 2022, as published.
HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)

# The curves of the LMU paper (Chilkuri et al. 2021, arXiv 2110.02402) on OpenWebText2, n = 1024: loss against non-embedding N
# after 25,000 steps of 512 x 1024 tokens; for the LSTM after ten times as many. The paper's critical batch has B_star = 2.0e8.
PAPER_STEPS, PAPER_BATCH_TOKENS, PAPER_CRITICAL = 25_000, 512 * 1024, CriticalBatch(2.0e8, 0.21)
PAPER = {"lstm": PowerLaw(7.45e14, 0.071), "lmu": PowerLaw(1.95e14, 0.072), "lmu_attention": PowerLaw(3.80e14, 0.069)}


def paper_loss(family: str, n_params: ArrayLike) -> Floats:
    """Returns the LMU paper's loss in nats; the transformer's is Kaplan's L(N, S_min). KeyError for other families."""
    if family != "transformer":
        return PAPER[family].loss(n_params)
    sizes = np.asarray(n_params, np.float64)
    losses = [KAPLAN_NS.loss_after(float(n), PAPER_STEPS, PAPER_BATCH_TOKENS, PAPER_CRITICAL) for n in sizes.ravel()]
    return np.array(losses).reshape(sizes.shape)
