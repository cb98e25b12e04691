"""Laws of runs that read their data more than once: the tokens of a repeated epoch are worth less than new ones."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from lmu_dist.scaling.laws import Chinchilla, Floats, ScalingLaw, batch_law, scaled_prefactor

# Muennighoff et al. 2023, appendix A: the R_D* of their law, in which N has diminishing returns, too (R_N* = 5.309743). Other
# parameters were held at those of runs without repetition. In the form below, in which only D has such returns, the same 182
# runs give them R_D* = 2.9157, at a worse fit: many of their models are larger than their data deserve.
PUBLISHED = {"R_star": 15.387756}


@dataclass(frozen=True)
class Repeated(ScalingLaw):
    """L = E + A/N^alpha + B/D'^beta with D' = U + U R (1 - exp(-(D/U - 1)/R)): U unique tokens, R = R_star.

    Muennighoff et al. 2023 (arXiv 2305.16264), appendix A, without their effective N. Up to about R_star repetitions tokens are
    almost worth new ones; however often the data are repeated, D' stays below U (1 + R_star).
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    R_star: float
    LOG_PARAMETERS = ("E", "A", "B", "R_star")
    EXPONENTS = ("alpha", "beta")
    MORE_UNITLESS = ("R_star",)
    DEFAULTS = PUBLISHED
    NEEDS_UNIQUE = True
    FORMULA = "L = E + A/N^alpha + B/D'^beta,  D' = U + U R_star (1 - exp(-(D/U - 1)/R_star))"

    def loss(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns the predicted loss in nats; without `unique_tokens` nothing is repeated."""
        effective, _ = _effective_tokens(tokens, unique_tokens, self.R_star)
        return np.asarray(self.E + self.A * np.asarray(n_params, np.float64) ** -self.alpha + self.B * effective**-self.beta)

    def effective_tokens(self, tokens: ArrayLike, unique_tokens: ArrayLike) -> Floats:
        """Returns D': as many new tokens would give the same loss."""
        return _effective_tokens(tokens, unique_tokens, self.R_star)[0]

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/d(E, A, B, alpha, beta, R_star)."""
        effective, by_r_star = _effective_tokens(tokens, unique_tokens, self.R_star)
        inner = batch_law(Chinchilla, [self.E, self.A, self.B, self.alpha, self.beta])
        by_d = -self.beta * self.B * effective ** (-self.beta - 1)
        first = inner.gradient(n_params, effective)
        return np.concatenate([first, np.broadcast_to(by_d * by_r_star, first.shape[:-1])[..., None]], axis=-1)

    def rescaled(self, n_params: float, tokens: float) -> "Repeated":
        """Returns the law in plain units; A and B change."""
        a, b = scaled_prefactor(self.A, n_params, self.alpha), scaled_prefactor(self.B, tokens, self.beta)
        return replace(self, A=a, B=b)

    def additive(self) -> Chinchilla:
        """Returns the law of runs that repeat nothing."""
        return Chinchilla(self.E, self.A, self.B, self.alpha, self.beta)


@dataclass(frozen=True)
class Overfitted(ScalingLaw):
    """The law of repeated data, with a loss that rises again: L = Repeated + P N^kappa max(0, D/U - epochs).

    After `epochs` readings of the data every further one adds a constant, more in larger models. Muennighoff et al. 2023
    describe the rise (section 6) and exclude such runs from their fit; the added term is ours.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    R_star: float
    P: float
    kappa: float
    epochs: float
    LOG_PARAMETERS = ("E", "A", "B", "R_star", "P", "epochs")
    EXPONENTS = ("alpha", "beta", "kappa")
    MORE_UNITLESS = ("R_star", "epochs")
    DEFAULTS = PUBLISHED
    KINK = "epochs"
    NEEDS_UNIQUE = True
    FORMULA = Repeated.FORMULA.replace("L =", "L = P N^kappa max(0, D/U - epochs) +")

    def _repeated(self) -> Repeated:
        return batch_law(Repeated, [self.E, self.A, self.B, self.alpha, self.beta, self.R_star])

    def loss(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns the predicted loss in nats; without `unique_tokens` nothing is repeated."""
        excess = np.maximum(_readings(tokens, unique_tokens) - self.epochs, 0)
        rise = self.P * np.asarray(n_params, np.float64) ** self.kappa * excess
        return np.asarray(self._repeated().loss(n_params, tokens, unique_tokens) + rise)

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/d(E, A, B, alpha, beta, R_star, P, kappa, epochs)."""
        n = np.asarray(n_params, np.float64)
        excess, power = np.maximum(_readings(tokens, unique_tokens) - self.epochs, 0), n**self.kappa
        first = self._repeated().gradient(n_params, tokens, unique_tokens)
        more = [power * excess, self.P * power * np.log(n) * excess, -self.P * power * (excess > 0)]
        return np.concatenate([first, np.stack([np.broadcast_to(m, first.shape[:-1]) for m in more], axis=-1)], axis=-1)

    def rescaled(self, n_params: float, tokens: float) -> "Overfitted":
        """Returns the law in plain units; A, B and P change."""
        a, b = scaled_prefactor(self.A, n_params, self.alpha), scaled_prefactor(self.B, tokens, self.beta)
        return replace(self, A=a, B=b, P=scaled_prefactor(self.P, n_params, -self.kappa))

    def additive(self) -> Chinchilla:
        """Returns the law of runs that repeat nothing."""
        return self._repeated().additive()


def _readings(tokens: ArrayLike, unique_tokens: ArrayLike | None) -> Floats:
    """Returns D/U, at least 1: how many times a run reads its data."""
    d = np.asarray(tokens, np.float64)
    return np.ones_like(d) if unique_tokens is None else np.asarray(np.maximum(d / np.asarray(unique_tokens, np.float64), 1))


def _effective_tokens(tokens: ArrayLike, unique_tokens: ArrayLike | None, r_star: float | Floats) -> tuple[Floats, Floats]:
    """Returns D' and its derivative by R_star. A run that does not read all of its data has D' = D."""
    d = np.asarray(tokens, np.float64)
    unique = d if unique_tokens is None else np.minimum(d, np.asarray(unique_tokens, np.float64))
    repetitions = d / unique - 1
    decay = np.exp(-repetitions / r_star)
    by_r_star = unique * (1 - decay - decay * repetitions / r_star)
    return np.asarray(unique * (1 + r_star * (1 - decay))), np.asarray(by_r_star)
