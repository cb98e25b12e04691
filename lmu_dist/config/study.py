"""Configuration sections of many runs: ladder, tune, plan. Comments on the fields give meaning and unit of each key."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from lmu_dist.config.types import STRICT, Count, Exponent, Family, Listed, Natural, Positive, Section, number, numbers_in


@dataclass(frozen=True, config=STRICT)
class Rule:
    """A setting as a power law of the size N: value * (N / at_n_params)^exponent, clipped to [least, most].

    A plain number instead of a section is a constant.
    """

    value: Positive  # value of the setting at at_n_params, in the unit of the setting
    at_n_params: Count = 1_000_000  # N at which the setting has this value
    exponent: Exponent = 0.0  # exponent of N; 0: the same value at all sizes
    least: Positive | None = None  # lower bound; None: no bound
    most: Positive | None = None  # upper bound; None: no bound

    def at(self, n_params: int, anchor: tuple[float, int] | None = None) -> float:
        """The value at a size N. An `anchor` (value, size) replaces the rule's own value and at_n_params."""
        value, size = anchor or (self.value, self.at_n_params)
        value *= (n_params / size) ** self.exponent
        return min(max(value, self.least or 0.0), self.most or math.inf)


@dataclass(frozen=True, config=STRICT)
class RateRule(Rule):
    """The peak learning rate as a power law of the size N and the tokens D: value * (N / at_n_params)^exponent, clipped to
    [least, most], times (D / at_tokens)^token_exponent. A plain number is a constant. Under `wsd` budgets share a trunk all the
    same: its rate is that of the smallest budget until the decay of that budget starts, then that of the next one, and so on.
    """

    token_exponent: Exponent = 0.0  # exponent of D, such as -0.5; 0: the same rate for all budgets
    at_tokens: Count | None = None  # D at which the rate is that of the size; needed if token_exponent is not 0

    @model_validator(mode="after")
    def _anchored(self) -> "RateRule":
        if self.token_exponent and self.at_tokens is None:
            raise ValueError("token_exponent needs at_tokens, the budget at which the rate is `value`, such as 1e6")
        return self


RULED = ("train.learning_rate", "train.batch_tokens", "train.warmup_tokens")  # settings that ladder rules scale with N


NOT_TUNABLE = frozenset({"model.family", "model.n_params", "train.tokens"})
NOT_TUNABLE |= {"train.rate_token_exponent", "train.rate_at_tokens", "train.earlier_tokens"}  # a search has a single budget


def _check_tunable(key: str) -> None:
    if not key.startswith(("model.", "train.")) or key in NOT_TUNABLE:
        raise ValueError(
            f"{key} cannot be tuned; take keys of model and train, not family, n_params, tokens or those of budgets"
        )


def _rule(value: Any) -> Any:
    value = number(value)
    return {"value": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


PowerLaw = Annotated[Rule, BeforeValidator(_rule)]
RatePowerLaw = Annotated[RateRule, BeforeValidator(_rule)]
Settings = Annotated[dict[str, Any], BeforeValidator(numbers_in)]


@dataclass(frozen=True, config=STRICT)
class WorkersFrom:
    """Workers, ZeRO stage, micro-batch and ways to save memory of all cells above a size."""

    n_params: Natural  # smallest N that this entry applies to
    n_workers: Count  # worker processes per run
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None  # DeepSpeed ZeRO stage; None: cluster.zero_stage
    micro_batch_rows: Count | None = None  # rows per forward pass; None: cluster.micro_batch_rows
    activation_checkpointing: bool | None = None  # compute blocks again in the backward pass; None: as in section cluster
    offload: Literal["optimizer"] | None = None  # keep the optimizer state in the CPU's memory; None: cluster.offload


WorkersBySize = Annotated[tuple[WorkersFrom, ...], Listed]


@dataclass(frozen=True, config=STRICT)
class Tuned:
    """Best settings that `tune` found for a family at a size. A cell of the ladder uses the entry of its family that is nearest
    in log N. It scales learning rate, batch and warm-up from that size to its own by the exponents of the ladder's rules, and
    the learning rate from `tokens` to its own budget if the rule has a token_exponent.
    """

    family: Family  # family that was tuned
    n_params: Count  # N at which it was tuned
    settings: Settings  # dotted keys of `model` and `train`, with their best values
    tokens: Count | None = None  # tokens of the trials; needed for a tuned learning rate if the rule has a token_exponent

    @model_validator(mode="after")
    def _tunable(self) -> "Tuned":
        for key, value in self.settings.items():
            _check_tunable(key)
            if key in RULED and not isinstance(value, int | float):
                raise ValueError(f"settings: {key} must be a number, not {value!r}")
        return self


Ratio = Annotated[float, BeforeValidator(number), Field(gt=1, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class Until:
    """When a ladder stops before its last cell: when all 90 % intervals named here are narrow enough, or the budget is spent.
    Cells then run in waves, those first that narrow the intervals most per FLOP, or per hour if `hours` is given.
    """

    factor: Ratio | None = None  # upper over lower end, for the factor over plan.baseline at the largest size; such as 1.3
    alpha: Ratio | None = None  # upper over lower end, for the exponent of N of every family
    beta: Ratio | None = None  # upper over lower end, for the exponent of D of every family
    flops: Positive | None = None  # training FLOPs of all cells that have ended; no cell starts that exceeds them
    hours: Positive | None = None  # hours of workers, estimated as by `plan`; no cell starts that exceeds them

    @model_validator(mode="after")
    def _asks(self) -> "Until":
        if self.factor is None and self.alpha is None and self.beta is None:
            raise ValueError(
                "say which interval is to be narrow: factor, alpha or beta, with the ratio of its ends, such as 1.3"
            )
        if self.flops is not None and self.hours is not None:
            raise ValueError("give flops or hours as the budget, not both")
        return self


@dataclass(frozen=True, config=STRICT)
class LadderConfig:
    """A grid of runs (cells): families x sizes x token budgets x seeds. All other settings are in the other sections."""

    families: Annotated[tuple[Family, ...], Listed, Field(min_length=1)]  # families to train
    n_params: Annotated[tuple[Count, ...], Listed, Field(min_length=1)]  # sizes N, in non-embedding parameters
    tokens: Annotated[tuple[Count, ...], Listed] = ()  # token budgets, the same for all sizes
    tokens_per_param: Annotated[tuple[Positive, ...], Listed] = ()  # token budgets per parameter: multiplied by N
    seeds: Annotated[tuple[Natural, ...], Listed, Field(min_length=1)] = (0,)  # random seeds; each trains the whole grid once
    max_cell_flops: Positive | None = None  # cells with more training FLOPs are left out, `plan` lists them; None: no limit
    learning_rate: RatePowerLaw | None = None  # peak learning rate by size, and by budget; None: train.learning_rate
    batch_tokens: PowerLaw | None = None  # tokens per step by size, rounded to whole rows; None: train.batch_tokens
    warmup_tokens: PowerLaw | None = None  # tokens of warm-up by size; None: train.warmup_tokens
    workers: WorkersBySize = ()  # workers by size: the last entry with n_params <= N applies; none: section cluster
    tuned: Annotated[tuple[Tuned, ...], Listed] = ()  # best settings found by `tune`, usually by `include: tuned.yaml`
    until: Until | None = None  # stop early; None: train all cells

    @model_validator(mode="after")
    def _complete(self) -> "LadderConfig":
        if not self.tokens and not self.tokens_per_param:
            raise ValueError("give token budgets: tokens, a list such as [1e6, 1e7], or tokens_per_param")
        return self


@dataclass(frozen=True, config=STRICT)
class Range:
    """Search range of one setting. Give exactly one of the keys."""

    uniform: tuple[float, float] | None = None  # uniform distribution between the ends
    log: tuple[Positive, Positive] | None = None  # log-uniform distribution between the ends
    integer: tuple[int, int] | None = None  # whole numbers, uniform
    log_integer: tuple[Count, Count] | None = None  # whole numbers, log-uniform
    choice: Annotated[tuple[Any, ...], BeforeValidator(numbers_in), Listed] | None = None  # one of these values

    @model_validator(mode="after")
    def _one(self) -> "Range":
        given = [v for v in (self.uniform, self.log, self.integer, self.log_integer, self.choice) if v is not None]
        if len(given) != 1 or not given[0]:
            raise ValueError("give exactly one of uniform, log, integer, log_integer (each [low, high]) or choice (a list)")
        if self.choice is None and not given[0][0] < given[0][1]:
            raise ValueError(f"the low end {given[0][0]} must be below the high end {given[0][1]}")
        return self


@dataclass(frozen=True, config=STRICT)
class TuneConfig:
    """A hyperparameter search for each family and size. The budget of a trial is train.tokens."""

    families: Annotated[tuple[Family, ...], Listed, Field(min_length=1)]  # families to tune
    n_params: Annotated[tuple[Count, ...], Listed, Field(min_length=1)]  # sizes N to tune at, in non-embedding parameters
    space: Annotated[dict[str, Range], Field(min_length=1)]  # search range of each tuned key of `model` and `train`
    samples: Count = 16  # trials per search; a `sweep` ignores it and tries all combinations of choices
    search: Literal["random", "optuna", "sweep"] = "optuna"  # random: independent draws; optuna: TPE; sweep: full grid
    first_rung_tokens: Count | None = None  # ASHA: tokens at the first comparison of trials; None: no early stopping
    reduction_factor: Annotated[int, Field(ge=2)] = 4  # ASHA: k; keep the best 1/k trials and give each k times the tokens

    @property
    def n_trials(self) -> int:
        """Number of trials per search."""
        if self.search != "sweep":
            return self.samples
        return math.prod(len(where.choice or ()) for where in self.space.values())

    @model_validator(mode="after")
    def _known(self) -> "TuneConfig":
        for key, where in self.space.items():
            _check_tunable(key)
            if self.search == "sweep" and where.choice is None:
                raise ValueError(f"space: {key} needs a choice (a list), because a sweep tries every value")
        return self


@dataclass(frozen=True, config=STRICT)
class AssumedLaw:
    """The scaling law L(N, D) = E + A / N^alpha + B / D^beta in nats per token. Defaults: Hoffmann et al. 2022 (Chinchilla)."""

    E: Positive = 1.69  # irreducible loss in nats per token
    A: Positive = 406.4  # prefactor of the size term
    B: Positive = 410.7  # prefactor of the data term
    alpha: Positive = 0.34  # exponent of N, the number of parameters
    beta: Positive = 0.28  # exponent of D, the number of training tokens


@dataclass(frozen=True, config=STRICT)
class PlanConfig:
    """Assumptions of `plan` about machines, prices and scaling laws."""

    worker_memory_bytes: Positive = 80e9  # memory of a GPU, or of a worker on CPUs, in bytes; a share of a GPU has its share
    flops_per_second: Positive | None = None  # executed training FLOP/s per worker; None: measured by `plan --calibrate`
    price_per_worker_hour: Annotated[float, Field(ge=0)] = 0.0  # price of a worker for an hour, in any currency
    law: Annotated[AssumedLaw, Section] = AssumedLaw()  # assumed scaling law of the baseline family
    efficiency_factor: Positive = 10.0  # assumed: the other families reach a loss with this many times fewer tokens
    baseline: Family = "transformer"  # family that the others are compared with, also by `report` and `next`
    n_slots: Count | None = None  # workers that run at the same time; None: as many as the largest cell has
    noise: Positive = 0.005  # standard deviation of ln L between runs that differ in the seed only
