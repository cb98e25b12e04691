"""Laws with more parameters than Chinchilla's, for tables that its form does not fit: gamma and farseer."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from lmu_dist.scaling.laws import Chinchilla, Floats, ScalingLaw, batch_law, in_columns, scaled_prefactor

LOG_TOKENS = 24.0  # ln of 2.6e10 tokens: the D at which the coordinates of Farseer's law take its token term
MIN_CURVATURE = 1e-6
MAX_CURVATURE = 1.0  # of the functions of N: a step in N is no law


@dataclass(frozen=True)
class Gamma(ScalingLaw):
    """L = E + (A/N^alpha + B/D^beta)^gamma: with gamma = 1 Chinchilla's law, otherwise N and D interact.

    Busbridge et al. 2025 (arXiv 2502.08606), for supervised training; also used for xLSTM (arXiv 2510.02228).
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float
    LOG_PARAMETERS = ("E", "A", "B", "gamma")
    EXPONENTS = ("alpha", "beta")
    MORE_UNITLESS = ("gamma",)
    FORMULA = "L = E + (A/N^alpha + B/D^beta)^gamma"

    def loss(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns the predicted loss in nats."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(self.E + (self.A * n**-self.alpha + self.B * d**-self.beta) ** self.gamma)

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/d(E, A, B, alpha, beta, gamma)."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        of_n, of_d = n**-self.alpha, d**-self.beta
        both = self.A * of_n + self.B * of_d
        power = both**self.gamma
        outer = self.gamma * power / both
        by_alpha, by_beta = -self.A * of_n * np.log(n) * outer, -self.B * of_d * np.log(d) * outer
        return in_columns(1.0, of_n * outer, of_d * outer, by_alpha, by_beta, power * np.log(both))

    def rescaled(self, n_params: float, tokens: float) -> "Gamma":
        """Returns the law in plain units; A and B change."""
        a, b = scaled_prefactor(self.A, n_params, self.alpha), scaled_prefactor(self.B, tokens, self.beta)
        return replace(self, A=a, B=b)

    def additive(self) -> Chinchilla:
        """Returns the expression in brackets, whose minimum is at the same N and D as that of the loss."""
        return Chinchilla(0.0, self.A, self.B, self.alpha, self.beta)


@dataclass(frozen=True)
class Farseer(ScalingLaw):
    """L = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) D^-exp(a1 N^alpha + b1): the token exponent depends on N.

    Li et al. 2025 (arXiv 2506.10972). No parameter is determined by itself, so only predictions have intervals. A
    fit varies, for each of the three functions a N^k + b of N, its value and slope at the middle size, and atanh(k): so |k| is
    below MAX_CURVATURE.
    """

    a1: float
    b1: float
    alpha: float
    a2: float
    b2: float
    beta: float
    a3: float
    b3: float
    gamma: float
    LOG_PARAMETERS = ()
    EXPONENTS = ()
    HAS_FLOOR = False
    FLEXIBLE = True
    FORMULA = "L = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) / D^exp(a1 N^alpha + b1)"

    def _terms(self, n_params: ArrayLike, tokens: ArrayLike) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Returns ln N, ln D, the token exponent, the token term and the size term."""
        x, y = np.log(np.asarray(n_params, np.float64)), np.log(np.asarray(tokens, np.float64))
        exponent = np.exp(self.a1 * np.exp(self.alpha * x) + self.b1)
        of_d = np.exp(self.a2 * np.exp(self.beta * x) + self.b2 - exponent * y)
        of_n = np.exp(self.a3 * np.exp(self.gamma * x) + self.b3)
        return np.asarray(x), np.asarray(y), np.asarray(exponent), np.asarray(of_d), np.asarray(of_n)

    def loss(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns the predicted loss in nats."""
        _, _, _, of_d, of_n = self._terms(n_params, tokens)
        return np.asarray(of_d + of_n)

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/d(a1, b1, alpha, a2, b2, beta, a3, b3, gamma)."""
        x, y, exponent, of_d, of_n = self._terms(n_params, tokens)
        columns = list[Floats]()
        for outer, a, k in (
            (-of_d * y * exponent, self.a1, self.alpha),
            (of_d, self.a2, self.beta),
            (of_n, self.a3, self.gamma),
        ):
            power = np.exp(k * x)
            columns += [outer * power, outer, outer * a * power * x]
        return in_columns(*columns)

    def rescaled(self, n_params: float, tokens: float) -> "Farseer":
        """Returns the law in plain units of N. The form does not allow another unit of D."""
        assert tokens == 1
        scaled = [
            scaled_prefactor(a, n_params, -k) for a, k in ((self.a1, self.alpha), (self.a2, self.beta), (self.a3, self.gamma))
        ]
        return replace(self, a1=scaled[0], a2=scaled[1], a3=scaled[2])

    @classmethod
    def units(cls, n_params: Floats, tokens: Floats) -> tuple[float, float]:
        """Returns the geometric mean of N, and 1 for D."""
        return float(np.exp(np.log(n_params).mean())), 1.0

    def coordinates(self) -> Floats:
        """Returns value, slope and atanh(k) at N = 1, of the logarithms of the token exponent, the token and the size term."""
        u, s = self.b1 + self.a1, self.a1 * self.alpha
        middle = np.exp(u) * LOG_TOKENS
        token_term = (self.b2 + self.a2 - middle, self.a2 * self.beta - s * middle)
        bends = np.arctanh(np.clip(np.array([self.alpha, self.beta, self.gamma]) / MAX_CURVATURE, -1 + 1e-12, 1 - 1e-12))
        size_term = (self.b3 + self.a3, self.a3 * self.gamma)
        return np.array([u, s, bends[0], *token_term, bends[1], *size_term, bends[2]], np.float64)

    @classmethod
    def from_coordinates(cls, vector: Floats) -> "Farseer":
        """Returns the law of a vector (9), or the laws of vectors (laws, 9) as one with array fields."""
        u, s, k, v, w, k2, u3, s3, k3 = vector.T
        middle = np.exp(u) * LOG_TOKENS
        values = list[Floats]()
        for value, slope, bend in ((u, s, k), (v + middle, w + s * middle, k2), (u3, s3, k3)):
            curvature = MAX_CURVATURE * np.tanh(bend)
            bent = np.where(np.abs(curvature) < MIN_CURVATURE, MIN_CURVATURE, curvature)
            values += [slope / bent, value - slope / bent, bent]
        return batch_law(cls, values)

    def coordinate_gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/dcoordinate, (rows, 9)."""
        x, y, exponent, of_d, of_n = self._terms(n_params, tokens)
        u, s = self.b1 + self.a1, self.a1 * self.alpha
        middle = np.exp(u) * LOG_TOKENS
        g1, dg1 = _box_cox(self.alpha, x)
        g2, dg2 = _box_cox(self.beta, x)
        g3, dg3 = _box_cox(self.gamma, x)
        by_exponent = -of_d * y * exponent
        slope2 = self.a2 * self.beta
        tanh = [MAX_CURVATURE - k**2 / MAX_CURVATURE for k in (self.alpha, self.beta, self.gamma)]  # dk/dcoordinate
        columns = [
            by_exponent + of_d * middle * (1 + s * g2),
            by_exponent * g1 + of_d * middle * g2,
            by_exponent * s * dg1 * tanh[0],
            of_d,
            of_d * g2,
            of_d * slope2 * dg2 * tanh[1],
            of_n,
            of_n * g3,
            of_n * (self.a3 * self.gamma) * dg3 * tanh[2],
        ]
        return in_columns(*columns)


def _box_cox(curvature: float | Floats, x: Floats) -> tuple[Floats, Floats]:
    """Returns g = (exp(k x) - 1) / k and dg/dk, exact also where k x is small."""
    kx = np.asarray(curvature * x)
    small = np.abs(kx) < 1e-3
    safe = np.where(small, 1.0, kx)
    ratio = np.where(small, 1 + kx / 2 + kx**2 / 6, np.expm1(safe) / safe)
    bend = np.where(small, 0.5 + kx / 3 + kx**2 / 8, (np.exp(safe) * safe - np.expm1(safe)) / safe**2)
    return x * ratio, x**2 * bend


# Laws with losses like those of language models, for simulations and as a start of fits: the values are nobody's results.
EXAMPLE_FARSEER = Farseer(a1=-0.124, b1=0.424, alpha=0.123, a2=88.01, b2=-5.287, beta=-0.1, a3=-0.021, b3=-0.091, gamma=0.169)
EXAMPLE_GAMMA = Gamma(E=1.220, A=3355.0, B=18186.0, alpha=0.408, beta=0.431, gamma=0.452)
