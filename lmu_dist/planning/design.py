"""What is known about a question: cells, results and laws in, the number that is asked for and its 90 % interval out.

The law of every family is linearised at its fit. Errors of runs have one standard deviation in all families. Runs of the same
size and seed share a part of it, since they share the data order and, with the schedule `wsd`, the steps of a trunk. Called by
learn, next_cell and until.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmu_dist.planning.information import N_PARAMETERS, Information
from lmu_dist.scaling.intervals import CONFIDENCE, Interval
from lmu_dist.scaling.laws import Chinchilla, Floats
from lmu_dist.scaling.quantiles import t_quantile
from lmu_dist.scaling.run_losses import RunLoss, group_of
from lmu_dist.scaling.shared_noise import huber_loss_of_precision
from lmu_dist.scaling.table import SIZE_BIN_RATIO

MARGIN = 1.1  # by which intervals are wider than their linear approximation, since they are looked at again and again


@dataclass(frozen=True)
class PlannedCell:
    """A cell of a plan. A trunk's cells share their steps; one starts at the `decay_start` of a shorter one."""

    key: str
    name: str
    family: str
    n_params: int
    tokens: int
    seed: int
    trunk: str
    steps: int
    decay_start: int
    step_flops: float  # counted training FLOPs of a step
    step_hours: float | None = None  # worker-hours of a step; None: unknown
    n_workers: int = 1

    @property
    def group(self) -> str:
        """The runs whose errors have a part in common with its own."""
        return group_of(self.family, self.n_params, self.seed)

    def step_cost(self, per: str) -> float:
        """FLOPs or worker-hours of a step."""
        return self.step_flops if per == "flops" else self.step_hours or 0.0


@dataclass(frozen=True)
class Question:
    """A number whose interval is to become narrower: of one family, or the factor of `family` against `base`.

    kind: factor | alpha | beta | loss. A loss has the size and tokens at which it is predicted, a factor its size.
    """

    kind: str
    family: str
    base: str = ""
    n_params: float = 0.0
    tokens: float = 0.0

    @property
    def families(self) -> tuple[str, ...]:
        """The families whose runs say something about it."""
        return (self.base, self.family) if self.base else (self.family,)

    def __str__(self) -> str:
        if self.kind == "factor":
            return f"data-efficiency factor of {self.family} over {self.base} at N = {self.n_params:,.0f}"
        if self.kind == "loss":
            return f"loss of {self.family} at N = {self.n_params:,.4g}, D = {self.tokens:,.4g}"
        return f"{self.kind} of {self.family}"


@dataclass(frozen=True)
class Knowledge:
    """What the finished runs say: the law of every family, the noise, and the information about the law's coordinates.

    `reasons` says, by family, why the law is not determined; empty for a law that is. Such a law is assumed: its geometry
    decides which cell is next, but no interval follows from it. `noise` is the standard deviation of ln L between runs, and
    `shared` the part of its square that the runs of a group have in common. `unfit` are the families whose runs show that the
    form of the law is wrong.
    """

    results: tuple[RunLoss, ...]
    laws: Mapping[str, Chinchilla]
    reasons: Mapping[str, str]
    noise: float
    shared: float
    freedom: int  # degrees of freedom of the noise
    units: tuple[float, float]  # of N and D
    information: Mapping[str, Information] = field(default_factory=dict)
    unfit: frozenset[str] = frozenset()

    def rows(self, family: str, n_params: Sequence[float], tokens: Sequence[float]) -> Floats:
        """The gradients of ln L by the law's coordinates, (runs, 5)."""
        n, d = np.asarray(n_params, np.float64) / self.units[0], np.asarray(tokens, np.float64) / self.units[1]
        law = self._scaled(family)
        return law.coordinate_gradient(n, d) / law.loss(n, d)[:, None]

    @property
    def deviation(self) -> float:
        """The standard deviation of a run's ln L with which least squares would be as precise as the Huber fit is."""
        return self.noise * huber_loss_of_precision(self.noise)

    @property
    def common_variance(self) -> float:
        """The covariance of ln L of two runs of a group. A Huber fit does not enlarge it, unlike the variance of a run."""
        return self.shared * self.noise**2

    def value(self, question: Question) -> tuple[float, dict[str, Floats]]:
        """The number that is asked for, and by family the gradient of its logarithm by the law's coordinates; nan without one.

        A factor is that at the middle of the losses which both families reach with the budgets of their finished runs at the
        size, as in the report.
        """
        if question.kind in ("alpha", "beta"):
            value = float(getattr(self.laws[question.family], question.kind))
            gradient = np.zeros(N_PARAMETERS)
            gradient[3 if question.kind == "alpha" else 4] = 1 / value
            return value, {question.family: gradient}
        if question.kind == "loss":
            law = self.laws[question.family]
            gradient = self.rows(question.family, [question.n_params], [question.tokens])[0]
            return float(law.loss(question.n_params, question.tokens)), {question.family: gradient}
        loss = self.compared_loss(question)
        return self.factor_gradients(question, loss) if loss is not None else (float("nan"), {})

    def factor_gradients(self, question: Question, loss: float) -> tuple[float, dict[str, Floats]]:
        """The factor at a loss, and the gradients of its logarithm."""
        logs, gradients = dict[str, float](), dict[str, Floats]()
        for family in question.families:
            logs[family], gradients[family] = self._log_tokens(family, loss, question.n_params)
        gradients[question.family] = -gradients[question.family]
        return float(np.exp(logs[question.base] - logs[question.family])), gradients

    def compared_loss(self, question: Question) -> float | None:
        """The middle of the losses that both families reach with the budgets of their finished runs at the size; else None."""
        ranges = list[Interval]()
        for family in question.families:
            tokens = self.tokens_at(family, question.n_params)
            if not tokens:
                return None
            losses = self.laws[family].loss(question.n_params, [min(tokens), max(tokens)])
            ranges.append((float(losses[0]), float(losses[1])))
        top, bottom = min(first for first, _ in ranges), max(last for _, last in ranges)
        return float(np.sqrt(top * bottom)) if top > bottom else None

    def tokens_at(self, family: str, n_params: float) -> list[int]:
        """The budgets of a family's finished runs at a size."""
        return [r.tokens for r in self.results if r.family == family and same_size(r.n_params, n_params)]

    def interval(self, question: Question) -> tuple[float, Interval | None, str]:
        """The number that is asked for, its 90 % interval, and the reason if it has none."""
        for family in question.families:
            if reason := self.reasons[family]:
                return float("nan"), None, f"the law of {family} is not determined: {reason}"
        value, gradients = self.value(question)
        if not np.isfinite(value):
            return value, None, f"the families have no loss in common at N = {question.n_params:,.0f}"
        reach = MARGIN * quantile(self.freedom) * float(np.sqrt(self.variance(gradients)))
        return value, (value * float(np.exp(-reach)), value * float(np.exp(reach))), ""

    def variance(self, gradients: Mapping[str, Floats]) -> float:
        """The variance of the logarithm of a number with these gradients."""
        return float(sum(self.information[family].variances(g) for family, g in gradients.items()))

    def _scaled(self, family: str) -> Chinchilla:
        return self.laws[family].rescaled(1 / self.units[0], 1 / self.units[1])

    def _log_tokens(self, family: str, loss: float, n_params: float) -> tuple[float, Floats]:
        """The logarithm of the tokens at which a loss is reached, and its gradient, by central differences."""
        law, step = self._scaled(family), 1e-5
        n, start = n_params / self.units[0], law.coordinates()

        def log_tokens(vector: Floats) -> float:
            moved = Chinchilla.from_coordinates(vector)
            assert isinstance(moved, Chinchilla)
            return float(np.log(moved.tokens_for(loss, n)))

        steps = step * np.eye(N_PARAMETERS)
        gradient = np.array([(log_tokens(start + s) - log_tokens(start - s)) / (2 * step) for s in steps])
        return log_tokens(start), gradient


def same_size(a: float, b: float) -> bool:
    """Whether two sizes are compared as one."""
    return max(a, b) <= SIZE_BIN_RATIO * min(a, b)


def quantile(freedom: int) -> float:
    """The quantile of the t distribution that a 90 % interval needs."""
    return t_quantile((1 + CONFIDENCE) / 2, max(1, freedom))
