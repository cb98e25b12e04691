"""Scaling laws as functions: sizes, tokens or steps in, loss in nats out. Pure formulas; `fit` finds their parameters.

Legend: N parameters, D training tokens, S optimizer steps, B batch in tokens, C training FLOPs, L loss in nats per token.
Every law gives its prediction, its gradient by its parameters, and the split of a compute budget that it calls optimal.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import ClassVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

Floats = NDArray[np.float64]
SQRT_SIX = np.sqrt(np.float64(6))  # a numpy number: its powers overflow to infinity and do not raise


def _scaled(prefactor: float, unit: float, exponent: float) -> float:
    """prefactor x unit^exponent; infinite where that is too large, unlike Python's own power, which raises."""
    return float(prefactor * np.float64(unit) ** exponent)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return cast(float, brentq(function, low, high, xtol=1e-13))


class Law(ABC):
    """A law L(N, D). Its fields are its parameters; those in LOGGED are positive and fitted by their logarithm.

    EXPONENTS and E (where HAS_FLOOR) mean the same in any unit of N and D. SQUARES says that its authors fit it by least
    squares of L, not by Huber terms of ln L, SPARE how many runs more than parameters it takes to be believed.
    """

    LOGGED: ClassVar[tuple[str, ...]]
    EXPONENTS: ClassVar[tuple[str, ...]]
    HAS_FLOOR: ClassVar[bool] = True
    SQUARES: ClassVar[bool] = False
    SPARE: ClassVar[int] = 5

    @abstractmethod
    def loss(self, n_params: ArrayLike, tokens: ArrayLike) -> Floats:
        """Predicted loss in nats; inputs broadcast."""

    @abstractmethod
    def gradient(self, n_params: ArrayLike, tokens: ArrayLike) -> Floats:
        """dL/dparameter, (rows, parameters), in the order of the fields."""

    @abstractmethod
    def rescaled(self, n_params: float, tokens: float) -> "Law":
        """The same law for N and D in plain units, if this one takes them in units of (n_params, tokens)."""

    @abstractmethod
    def additive(self) -> "Chinchilla":
        """A law of the form E + A/N^alpha + B/D^beta that has the same optimal split of compute."""

    def optimum(self, flops: ArrayLike, k: float = 6.0, gamma: float = 1.0) -> tuple[Floats, Floats]:
        """(N, D) of least loss at C = k N^gamma D FLOPs: closed form, from dL = 0 along constant C.

        k = 6, gamma = 1 is the usual C = 6ND; other values describe models whose FLOPs per token are not 6N.
        """
        law = self.additive()
        per_token = np.asarray(flops, np.float64) / k  # N^gamma D
        power = 1 / (law.alpha + gamma * law.beta)
        n = (law.alpha * law.A / (gamma * law.beta * law.B) * per_token**law.beta) ** power
        return np.asarray(n), np.asarray(per_token / n**gamma)


@dataclass(frozen=True)
class Chinchilla(Law):
    """L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, arXiv 2203.15556, approach 3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    LOGGED = ("E", "A", "B")
    EXPONENTS = ("alpha", "beta")

    def loss(self, n_params: ArrayLike, tokens: ArrayLike) -> Floats:
        """Predicted loss in nats."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike) -> Floats:
        """dL/d(E, A, B, alpha, beta)."""
        n, d = np.broadcast_arrays(np.asarray(n_params, np.float64), np.asarray(tokens, np.float64))
        of_n, of_d = n**-self.alpha, d**-self.beta
        columns = [np.ones_like(of_n), of_n, of_d, -self.A * of_n * np.log(n), -self.B * of_d * np.log(d)]
        return np.stack(columns, axis=-1)

    def rescaled(self, n_params: float, tokens: float) -> "Chinchilla":
        """In plain units: A and B take up the units."""
        return replace(self, A=_scaled(self.A, n_params, self.alpha), B=_scaled(self.B, tokens, self.beta))

    def additive(self) -> "Chinchilla":
        """Itself."""
        return self

    def tokens_for(self, loss: ArrayLike, n_params: ArrayLike) -> Floats:
        """Tokens after which a model of a size has a loss; nan at or below the floor E + A/N^alpha."""
        n = np.asarray(n_params, np.float64)
        above = np.asarray(loss, np.float64) - self.E - self.A * n**-self.alpha
        return np.asarray((self.B / np.where(above > 0, above, np.nan)) ** (1 / self.beta))


@dataclass(frozen=True)
class Gadre(Law):
    """L = E + a N^eta + b 6^(eta/2) (M N)^eta with M = D/N tokens per parameter, eta < 0 (Gadre et al. 2024, arXiv 2403.08540).

    One exponent for both terms: training beyond the optimal M shifts the loss and leaves the slope in compute as it was.
    """

    E: float
    a: float
    b: float
    eta: float
    LOGGED = ("E", "a", "b")
    EXPONENTS = ("eta",)
    SQUARES = True
    SPARE = 1  # its authors extrapolate from five small runs

    def loss(self, n_params: ArrayLike, tokens: ArrayLike) -> Floats:
        """Predicted loss in nats."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(self.E + self.a * n**self.eta + self.b * SQRT_SIX**self.eta * d**self.eta)

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike) -> Floats:
        """dL/d(E, a, b, eta)."""
        n, d = np.broadcast_arrays(np.asarray(n_params, np.float64), np.asarray(tokens, np.float64))
        of_n, of_d = n**self.eta, SQRT_SIX**self.eta * d**self.eta
        by_eta = self.a * of_n * np.log(n) + self.b * of_d * (np.log(d) + np.log(6) / 2)
        return np.stack([np.ones_like(of_n), of_n, of_d, by_eta], axis=-1)

    def rescaled(self, n_params: float, tokens: float) -> "Gadre":
        """In plain units: a and b take up the units."""
        return replace(self, a=_scaled(self.a, n_params, -self.eta), b=_scaled(self.b, tokens, -self.eta))

    def additive(self) -> Chinchilla:
        """Chinchilla's form with alpha = beta = -eta."""
        return Chinchilla(self.E, self.a, float(self.b * SQRT_SIX**self.eta), -self.eta, -self.eta)


@dataclass(frozen=True)
class Kaplan(Law):
    """L(N, D) = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D (Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5)."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float
    LOGGED = ("N_c", "D_c")
    EXPONENTS = ("alpha_N", "alpha_D")
    HAS_FLOOR = False

    def loss(self, n_params: ArrayLike, tokens: ArrayLike) -> Floats:
        """Predicted loss in nats."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(((self.N_c / n) ** (self.alpha_N / self.alpha_D) + self.D_c / d) ** self.alpha_D)

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike) -> Floats:
        """dL/d(N_c, D_c, alpha_N, alpha_D)."""
        n, d = np.broadcast_arrays(np.asarray(n_params, np.float64), np.asarray(tokens, np.float64))
        ratio = self.alpha_N / self.alpha_D
        of_n, of_d = (self.N_c / n) ** ratio, self.D_c / d
        both = of_n + of_d
        loss, log_n = both**self.alpha_D, np.log(self.N_c / n)
        outer = self.alpha_D * loss / both  # dL/d(of_n) = dL/d(of_d)
        by_n_c, by_d_c = outer * of_n * ratio / self.N_c, outer * of_d / self.D_c
        by_alpha_n = outer * of_n * log_n / self.alpha_D
        by_alpha_d = loss * np.log(both) - outer * of_n * log_n * ratio / self.alpha_D
        return np.stack([by_n_c, by_d_c, by_alpha_n, by_alpha_d], axis=-1)

    def rescaled(self, n_params: float, tokens: float) -> "Kaplan":
        """In plain units."""
        return replace(self, N_c=float(self.N_c * n_params), D_c=float(self.D_c * tokens))

    def additive(self) -> Chinchilla:
        """What stands in the brackets, whose least value is where the loss is least."""
        ratio = self.alpha_N / self.alpha_D
        return Chinchilla(0.0, self.N_c**ratio, self.D_c, ratio, 1.0)


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = (scale/x)^exponent: Kaplan's L(N) and L(D), and the paper's curves."""

    scale: float
    exponent: float

    def loss(self, x: ArrayLike) -> Floats:
        """Predicted loss in nats."""
        return np.asarray((self.scale / np.asarray(x, np.float64)) ** self.exponent)

    def gradient(self, x: ArrayLike) -> Floats:
        """dL/d(scale, exponent), (rows, 2)."""
        loss = self.loss(x)
        return np.stack([self.exponent * loss / self.scale, loss * np.log(self.scale / np.asarray(x, np.float64))], axis=-1)

    def x_for(self, loss: ArrayLike) -> Floats:
        """The N (or D) at which it has a loss."""
        return np.asarray(self.scale * np.asarray(loss, np.float64) ** (-1 / self.exponent))


@dataclass(frozen=True)
class CriticalBatch:
    """B_crit(L) = B_star / L^(1/alpha_B) tokens: the batch of twice the least steps and twice the least tokens (Kaplan,
    5.1)."""

    B_star: float
    alpha_B: float

    def tokens(self, loss: ArrayLike) -> Floats:
        """B_crit in tokens."""
        return np.asarray(self.B_star * np.asarray(loss, np.float64) ** (-1 / self.alpha_B))

    def s_min(self, steps: ArrayLike, batch_tokens: ArrayLike, loss: ArrayLike) -> Floats:
        """S_min = S / (1 + B_crit/B): the steps a much larger batch would have needed for the same loss."""
        return np.asarray(np.asarray(steps) / (1 + self.tokens(loss) / np.asarray(batch_tokens)))

    def c_min(self, flops: ArrayLike, batch_tokens: ArrayLike, loss: ArrayLike) -> Floats:
        """C_min = C / (1 + B/B_crit): the FLOPs a much smaller batch would have needed for the same loss."""
        return np.asarray(np.asarray(flops) / (1 + np.asarray(batch_tokens) / self.tokens(loss)))


@dataclass(frozen=True)
class KaplanSteps:
    """L(N, S_min) = (N_c/N)^alpha_N + (S_c/S_min)^alpha_S (Kaplan et al. 2020, eq. 1.6); warm-up is not in its data."""

    N_c: float
    S_c: float
    alpha_N: float
    alpha_S: float

    def loss(self, n_params: ArrayLike, s_min: ArrayLike) -> Floats:
        """Predicted loss in nats."""
        n, s = np.asarray(n_params, np.float64), np.asarray(s_min, np.float64)
        return np.asarray((self.N_c / n) ** self.alpha_N + (self.S_c / s) ** self.alpha_S)

    def gradient(self, n_params: ArrayLike, s_min: ArrayLike) -> Floats:
        """dL/d(N_c, S_c, alpha_N, alpha_S)."""
        n, s = np.broadcast_arrays(np.asarray(n_params, np.float64), np.asarray(s_min, np.float64))
        of_n, of_s = (self.N_c / n) ** self.alpha_N, (self.S_c / s) ** self.alpha_S
        columns = [self.alpha_N * of_n / self.N_c, self.alpha_S * of_s / self.S_c]
        return np.stack([*columns, of_n * np.log(self.N_c / n), of_s * np.log(self.S_c / s)], axis=-1)

    def loss_after(self, n_params: float, steps: float, batch_tokens: float, critical: CriticalBatch) -> float:
        """Loss after S steps at batch B. S_min depends on the loss it gives: the fixed point, which is the only one.

        With the loss B_crit falls and S_min rises, so the law's answer falls: it crosses the loss assumed exactly once.
        """

        def excess(log_loss: float) -> float:
            assumed = np.exp(log_loss)
            return float(self.loss(n_params, critical.s_min(steps, batch_tokens, assumed)) - assumed)

        return float(np.exp(_root(excess, np.log(1e-3), np.log(1e4))))

    def optimum(self, c_min: float, critical: CriticalBatch) -> tuple[float, float]:
        """(N, S_min) of least loss at C_min = 6 N B_crit(L) S_min FLOPs (Kaplan, appendix B).

        There the second term is alpha_N/alpha_S of the first, so all is a power of N, and N one of C_min.
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
        """Exponent of L in C_min along the optimum: 1 / (1/alpha_S + 1/alpha_B' + 1/alpha_N), where B_crit ~
        L^(-1/alpha_B')."""
        return 1 / (1 / self.alpha_S + 1 / critical.alpha_B + 1 / self.alpha_N)


# Kaplan et al. 2020, as published. N without embeddings.
KAPLAN_N, KAPLAN_D = PowerLaw(8.8e13, 0.076), PowerLaw(5.4e13, 0.095)
KAPLAN_ND = Kaplan(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)
KAPLAN_NS, KAPLAN_BATCH = KaplanSteps(N_c=6.5e13, S_c=2.1e3, alpha_N=0.077, alpha_S=0.76), CriticalBatch(2.1e8, 0.21)
# Hoffmann et al. 2022, as published.
HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)

# The paper's curves (Chilkuri et al. 2021, arXiv 2110.02402), on OpenWebText2, n = 1024: loss against non-embedding N after its
# 25,000 steps of 512 x 1024 tokens; the LSTM's after ten times as many. Its critical batch has B_star = 2.0e8.
PAPER_STEPS, PAPER_BATCH_TOKENS, PAPER_CRITICAL = 25_000, 512 * 1024, CriticalBatch(2.0e8, 0.21)
PAPER = {"lstm": PowerLaw(7.45e14, 0.071), "lmu": PowerLaw(1.95e14, 0.072), "lmu_attention": PowerLaw(3.80e14, 0.069)}


def paper_loss(family: str, n_params: ArrayLike) -> Floats:
    """The paper's curve of a family, in nats; the transformer's is Kaplan's L(N, S_min) at its steps. KeyError for others."""
    if family != "transformer":
        return PAPER[family].loss(n_params)
    sizes = np.asarray(n_params, np.float64)
    losses = [KAPLAN_NS.loss_after(float(n), PAPER_STEPS, PAPER_BATCH_TOKENS, PAPER_CRITICAL) for n in sizes.ravel()]
    return np.array(losses).reshape(sizes.shape)


FORMS: dict[str, type[Law]] = {"chinchilla": Chinchilla, "kaplan": Kaplan, "gadre": Gadre}


def parameters(law: Law) -> dict[str, float]:
    """A law's parameters by name."""
    return dict(zip(type(law).__dataclass_fields__, astuple(law), strict=True))  # pyright: ignore
