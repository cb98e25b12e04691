"""Scaling laws as functions: sizes and tokens in, loss in nats out. `fit` finds their parameters.

Symbols: N parameters, D training tokens, C training FLOPs, L loss in nats per token.
Every law has its predicted loss, the gradient by its parameters, and the compute-optimal allocation.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Law = TypeVar("Law", bound="ScalingLaw")
SQRT_SIX = np.sqrt(np.float64(6))  # a numpy number: its powers overflow to infinity and do not raise


def scaled_prefactor(prefactor: float, unit: float, exponent: float) -> float:
    """Returns prefactor x unit^exponent, or infinity on overflow, where Python's own power would raise."""
    return float(prefactor * np.float64(unit) ** exponent)


def in_columns(*parts: ArrayLike) -> Floats:
    """Returns arrays, which broadcast, as the last axis of one; in a third of the time that np.stack takes for small ones."""
    result = np.empty((*np.broadcast(*parts).shape, len(parts)))
    for i, part in enumerate(parts):
        result[..., i] = part
    return result


class ScalingLaw(ABC):
    """A law L(N, D). Its fields are its parameters; those in LOG_PARAMETERS are positive and fitted as logarithms.

    EXPONENTS and E (if HAS_FLOOR) do not depend on the units of N and D. LEAST_SQUARES: its authors fit it by least squares of
    L, not by Huber losses of ln L. MIN_EXTRA_RUNS: how many more runs than parameters a trustworthy fit needs. NEEDS_UNIQUE:
    its loss takes the unique tokens as a third argument. FLEXIBLE: only its predictions are determined, not each parameter.
    The fields may also be arrays of shape (laws, 1); losses are then (laws, rows) and gradients (laws, rows, parameters).
    """

    LOG_PARAMETERS: ClassVar[tuple[str, ...]]
    EXPONENTS: ClassVar[tuple[str, ...]]
    HAS_FLOOR: ClassVar[bool] = True
    LEAST_SQUARES: ClassVar[bool] = False
    MIN_EXTRA_RUNS: ClassVar[int] = 5
    NEEDS_UNIQUE: ClassVar[bool] = False
    FLEXIBLE: ClassVar[bool] = False
    FORMULA: ClassVar[str] = ""
    MORE_UNITLESS: ClassVar[tuple[str, ...]] = ()  # besides EXPONENTS and E
    DEFAULTS: ClassVar[Mapping[str, float]] = {}  # published values of parameters that many tables cannot determine
    KINK: ClassVar[str] = ""  # a parameter in which the loss has a kink: it is found on a grid, and the others by descent

    @abstractmethod
    def loss(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns the predicted loss in nats; inputs broadcast. Only laws with NEEDS_UNIQUE use `unique_tokens`."""

    @abstractmethod
    def gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/dparameter, (rows, parameters), in the order of the fields."""

    def coordinates(self) -> Floats:
        """Returns the vector that a fit varies: the parameters, those in LOG_PARAMETERS as logarithms."""
        values = [getattr(self, name) for name in parameter_names(type(self))]
        logs = [name in self.LOG_PARAMETERS for name in parameter_names(type(self))]
        return np.array([np.log(v) if is_log else v for v, is_log in zip(values, logs, strict=True)], np.float64)

    @classmethod
    def from_coordinates(cls, vector: Floats) -> "ScalingLaw":
        """Returns the law of a vector (parameters), or the laws of vectors (laws, parameters) as one with array fields."""
        names = parameter_names(cls)
        return batch_law(cls, [np.exp(v) if name in cls.LOG_PARAMETERS else v for name, v in zip(names, vector.T, strict=True)])

    def coordinate_gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/dcoordinate, (rows, parameters)."""
        gradient = self.gradient(n_params, tokens, unique_tokens)
        for i, name in enumerate(parameter_names(type(self))):
            if name in self.LOG_PARAMETERS:
                gradient[..., i] *= getattr(self, name)
        return gradient

    @classmethod
    def units(cls, n_params: Floats, tokens: Floats) -> tuple[float, float]:
        """Returns the units of N and D in which a fit is well conditioned: the geometric means."""
        return float(np.exp(np.log(n_params).mean())), float(np.exp(np.log(tokens).mean()))

    @abstractmethod
    def rescaled(self, n_params: float, tokens: float) -> "ScalingLaw":
        """Returns this law, which takes N and D in units of (n_params, tokens), as a law that takes them in plain units."""

    def additive(self) -> "Chinchilla | None":
        """Returns a law of the form E + A/N^alpha + B/D^beta with the same compute-optimal N and D; None if there is none."""
        return None

    def optimum(self, flops: ArrayLike, k: float = 6.0, gamma: float = 1.0) -> tuple[Floats, Floats]:
        """Returns the (N, D) of lowest loss at C = k N^gamma D FLOPs; nan where the loss has no minimum.

        In closed form from dL = 0 at constant C if the law has an additive form, otherwise by a search. k = 6,
        gamma = 1 is the usual C = 6ND; other values describe models whose FLOPs per token are not 6N.
        """
        law = self.additive()
        per_token = np.asarray(flops, np.float64) / k  # N^gamma D
        if law is None:
            n = _search_optimum(self, per_token, gamma)
            return n, np.asarray(per_token / n**gamma)
        power = 1 / (law.alpha + gamma * law.beta)
        n = (law.alpha * law.A / (gamma * law.beta * law.B) * per_token**law.beta) ** power
        return np.asarray(n), np.asarray(per_token / n**gamma)


def batch_law(form: type[Law], values: Sequence[float | Floats]) -> Law:
    """Returns a law whose fields are the values: numbers, or arrays (laws), which become columns (laws, 1)."""
    if np.ndim(values[0]) == 0:
        return form(*(float(value) for value in values))
    law = object.__new__(form)  # the fields are declared as numbers, so the constructor would not take arrays
    for name, value in zip(parameter_names(form), values, strict=True):
        array = np.asarray(value)
        object.__setattr__(law, name, array[:, None] if array.ndim == 1 else array)
    return law


def _search_optimum(law: ScalingLaw, per_token: Floats, gamma: float) -> Floats:
    """Returns the N of lowest loss at constant N^gamma D, by grids that become finer; nan if the first has no minimum inside.

    A minimum at an end is none: far outside of any table a flexible law may fall without bounds.
    """
    middle, reach = np.log(per_token) / (1 + gamma), 5.0
    steps = np.linspace(-1, 1, 61)
    found = np.ones(np.shape(middle), bool)
    with np.errstate(all="ignore"):
        for grid in range(8):
            log_n = middle[..., None] + reach * steps
            loss = law.loss(np.exp(log_n), per_token[..., None] * np.exp(-gamma * log_n))
            if grid == 0:
                inside = (loss[..., 1:-1] < loss[..., :-2]) & (loss[..., 1:-1] <= loss[..., 2:])
                found = inside.any(axis=-1)
                loss = np.concatenate(
                    [loss[..., :1] + np.inf, np.where(inside, loss[..., 1:-1], np.inf), loss[..., :1] + np.inf], -1
                )
            best = np.argmin(loss, axis=-1)
            middle, reach = np.take_along_axis(log_n, best[..., None], axis=-1)[..., 0], reach * 2 / 30
    return np.asarray(np.where(found, np.exp(middle), np.nan))


@dataclass(frozen=True)
class Chinchilla(ScalingLaw):
    """L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, arXiv 2203.15556, approach 3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    LOG_PARAMETERS = ("E", "A", "B")
    EXPONENTS = ("alpha", "beta")
    FORMULA = "L = E + A/N^alpha + B/D^beta"

    def loss(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns the predicted loss in nats."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/d(E, A, B, alpha, beta)."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        of_n, of_d = n**-self.alpha, d**-self.beta
        return in_columns(1.0, of_n, of_d, -self.A * of_n * np.log(n), -self.B * of_d * np.log(d))

    def rescaled(self, n_params: float, tokens: float) -> "Chinchilla":
        """Returns the law in plain units; A and B change."""
        return replace(self, A=scaled_prefactor(self.A, n_params, self.alpha), B=scaled_prefactor(self.B, tokens, self.beta))

    def additive(self) -> "Chinchilla":
        """Returns the law itself."""
        return self

    def tokens_for(self, loss: ArrayLike, n_params: ArrayLike) -> Floats:
        """Returns the tokens at which a model of a size reaches a loss; nan at or below the floor E + A/N^alpha."""
        n = np.asarray(n_params, np.float64)
        above = np.asarray(loss, np.float64) - self.E - self.A * n**-self.alpha
        return np.asarray((self.B / np.where(above > 0, above, np.nan)) ** (1 / self.beta))


@dataclass(frozen=True)
class Gadre(ScalingLaw):
    """L = E + a N^eta + b 6^(eta/2) (M N)^eta with M = D/N tokens per parameter, eta < 0 (Gadre et al. 2024, arXiv 2403.08540).

    Both terms have one exponent: training beyond the optimal M shifts the loss but does not change its slope in compute.
    """

    E: float
    a: float
    b: float
    eta: float
    LOG_PARAMETERS = ("E", "a", "b")
    EXPONENTS = ("eta",)
    LEAST_SQUARES = True
    FORMULA = "L = E + a N^eta + b 6^(eta/2) D^eta"
    MIN_EXTRA_RUNS = 1  # its authors extrapolate from five small runs

    def loss(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns the predicted loss in nats."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(self.E + self.a * n**self.eta + self.b * SQRT_SIX**self.eta * d**self.eta)

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/d(E, a, b, eta)."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        of_n, of_d = n**self.eta, SQRT_SIX**self.eta * d**self.eta
        by_eta = self.a * of_n * np.log(n) + self.b * of_d * (np.log(d) + np.log(6) / 2)
        return in_columns(1.0, of_n, of_d, by_eta)

    def rescaled(self, n_params: float, tokens: float) -> "Gadre":
        """Returns the law in plain units; a and b change."""
        return replace(self, a=scaled_prefactor(self.a, n_params, -self.eta), b=scaled_prefactor(self.b, tokens, -self.eta))

    def additive(self) -> Chinchilla:
        """Returns Chinchilla's form with alpha = beta = -eta."""
        return Chinchilla(self.E, self.a, float(self.b * SQRT_SIX**self.eta), -self.eta, -self.eta)


@dataclass(frozen=True)
class Kaplan(ScalingLaw):
    """L(N, D) = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D (Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5)."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float
    LOG_PARAMETERS = ("N_c", "D_c")
    EXPONENTS = ("alpha_N", "alpha_D")
    HAS_FLOOR = False
    FORMULA = "L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D"

    def loss(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns the predicted loss in nats."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(((self.N_c / n) ** (self.alpha_N / self.alpha_D) + self.D_c / d) ** self.alpha_D)

    def gradient(self, n_params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Floats:
        """Returns dL/d(N_c, D_c, alpha_N, alpha_D)."""
        n, d = np.asarray(n_params, np.float64), np.asarray(tokens, np.float64)
        ratio = self.alpha_N / self.alpha_D
        of_n, of_d = (self.N_c / n) ** ratio, self.D_c / d
        both = of_n + of_d
        loss, log_n = both**self.alpha_D, np.log(self.N_c / n)
        outer = self.alpha_D * loss / both  # dL/d(of_n) = dL/d(of_d)
        by_n_c, by_d_c = outer * of_n * ratio / self.N_c, outer * of_d / self.D_c
        by_alpha_n = outer * of_n * log_n / self.alpha_D
        by_alpha_d = loss * np.log(both) - outer * of_n * log_n * ratio / self.alpha_D
        return in_columns(by_n_c, by_d_c, by_alpha_n, by_alpha_d)

    def rescaled(self, n_params: float, tokens: float) -> "Kaplan":
        """Returns the law in plain units; N_c and D_c change."""
        return replace(self, N_c=scaled_prefactor(self.N_c, n_params, 1.0), D_c=scaled_prefactor(self.D_c, tokens, 1.0))

    def additive(self) -> Chinchilla:
        """Returns the expression in brackets, whose minimum is at the same N and D as that of the loss."""
        ratio = self.alpha_N / self.alpha_D
        return Chinchilla(0.0, self.N_c**ratio, self.D_c, ratio, 1.0)


def parameters(law: ScalingLaw) -> dict[str, float]:
    """Returns the parameters of a law by name."""
    return dict(zip(parameter_names(type(law)), astuple(law), strict=True))  # pyright: ignore


@cache
def parameter_names(form: type[ScalingLaw]) -> tuple[str, ...]:
    """Returns the names of the parameters of a law, in order."""
    return tuple(f.name for f in fields(form))  # pyright: ignore


def unitless_names(form: type[ScalingLaw]) -> list[str]:
    """Returns the names of the parameters that do not depend on the units of N and D."""
    return [*form.EXPONENTS, *form.MORE_UNITLESS, *(["E"] if form.HAS_FLOOR else [])]
