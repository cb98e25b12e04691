"""Sections that describe many runs: ladder, tune, plan, with the default and the meaning of every key."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from lmu_dist.config.types import STRICT, Count, Family, Natural, Positive


@dataclass(frozen=True, config=STRICT)
class Rule:
    """A power law in the size: value * (N / at_n_params)^exponent, kept between `least` and `most`. A number is a constant."""

    value: Positive
    at_n_params: Count = 1_000_000
    exponent: Annotated[float, Field(ge=-3, le=3)] = 0.0
    least: Positive | None = None
    most: Positive | None = None

    def at(self, n_params: int, anchor: tuple[float, int] | None = None) -> float:
        """The value at a size; from another (value, size) than the rule's own if an anchor is given."""
        value, size = anchor or (self.value, self.at_n_params)
        value *= (n_params / size) ** self.exponent
        return min(max(value, self.least or 0.0), self.most or math.inf)


RULED = ("train.learning_rate", "train.batch_tokens", "train.warmup_tokens")  # follow from N by a rule


def _check_tunable(key: str) -> None:
    if not key.startswith(("model.", "train.")) or key in ("train.tokens", "model.family", "model.n_params"):
        raise ValueError(f"{key} cannot be tuned; take keys of model and train, not family, n_params or tokens")


def _rule(value: Any) -> Any:
    return {"value": value} if isinstance(value, int | float) else value


PowerLaw = Annotated[Rule, BeforeValidator(_rule)]


@dataclass(frozen=True, config=STRICT)
class WorkersFrom:
    """From a size on: how many workers, at which ZeRO stage, with how many rows at a time."""

    n_params: Natural
    n_workers: Count
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None  # None: cluster.zero_stage
    micro_batch_rows: Count | None = None  # rows of one forward pass; None: cluster.micro_batch_rows


@dataclass(frozen=True, config=STRICT)
class Tuned:
    """What `tune` found best for a family at a size. The ladder takes the entry nearest in N (on a log scale) of the family,
    and carries learning rate, batch and warm-up from that size to a cell's own by the exponents of its rules."""

    family: Family
    n_params: Count
    settings: dict[str, Any]  # dotted keys of `model` and `train`

    @model_validator(mode="after")
    def _tunable(self) -> "Tuned":
        for key, value in self.settings.items():
            _check_tunable(key)
            if key in RULED and not isinstance(value, int | float):
                raise ValueError(f"settings: {key} must be a number, not {value!r}")
        return self


@dataclass(frozen=True, config=STRICT)
class LadderConfig:
    """A grid: families x sizes x token budgets x seeds. Everything else about its cells is in the other sections."""

    families: Annotated[tuple[Family, ...], Field(min_length=1)]
    n_params: Annotated[tuple[Count, ...], Field(min_length=1)]
    tokens: tuple[Count, ...] = ()  # budgets of every size
    tokens_per_param: tuple[Positive, ...] = ()  # budgets that grow with N
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    max_cell_flops: Positive | None = None  # dearer cells are left out, and named by `plan`
    learning_rate: PowerLaw | None = None  # None: train.learning_rate
    batch_tokens: PowerLaw | None = None  # rounded to whole rows for every worker
    warmup_tokens: PowerLaw | None = None
    workers: tuple[WorkersFrom, ...] = ()  # the last entry whose n_params is not above N; none: section cluster
    tuned: tuple[Tuned, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> "LadderConfig":
        if not self.tokens and not self.tokens_per_param:
            raise ValueError("give budgets: tokens, a list such as [1e6, 1e7], or tokens_per_param")
        return self


@dataclass(frozen=True, config=STRICT)
class Range:
    """Where a tuned setting may lie: one of `uniform`, `log` (evenly in the logarithm), `integer`, `log_integer`, `choice`."""

    uniform: tuple[float, float] | None = None
    log: tuple[Positive, Positive] | None = None
    integer: tuple[int, int] | None = None
    log_integer: tuple[Count, Count] | None = None
    choice: tuple[Any, ...] | None = None

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
    """A search over dotted keys, one for every family and size; train.tokens is the budget of one trial."""

    families: Annotated[tuple[Family, ...], Field(min_length=1)]
    n_params: Annotated[tuple[Count, ...], Field(min_length=1)]
    space: Annotated[dict[str, Range], Field(min_length=1)]
    samples: Count = 16  # trials of each search; of a `sweep`, as many as the choices make
    search: Literal["random", "optuna", "sweep"] = "optuna"
    first_rung_tokens: Count | None = None  # ASHA compares trials from here on; None: nothing is stopped early
    reduction_factor: Annotated[int, Field(ge=2)] = 4  # one in so many goes on from a rung, the next rung that many times later

    @property
    def n_trials(self) -> int:
        """Trials of each search."""
        if self.search != "sweep":
            return self.samples
        return math.prod(len(where.choice or ()) for where in self.space.values())

    @model_validator(mode="after")
    def _known(self) -> "TuneConfig":
        for key, where in self.space.items():
            _check_tunable(key)
            if self.search == "sweep" and where.choice is None:
                raise ValueError(f"space: {key} needs a choice, since a sweep tries all values")
        return self


@dataclass(frozen=True, config=STRICT)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta in nats (Hoffmann et al. 2022); the defaults are theirs."""

    E: Positive = 1.69
    A: Positive = 406.4
    B: Positive = 410.7
    alpha: Positive = 0.34
    beta: Positive = 0.28


@dataclass(frozen=True, config=STRICT)
class PlanConfig:
    """What `plan` assumes of machines, prices and laws."""

    worker_memory_bytes: Positive = 80e9
    flops_per_second: Positive | None = None  # that a worker keeps up in training; None: what `plan --calibrate` measured
    price_per_worker_hour: Annotated[float, Field(ge=0)] = 0.0
    law: Law = Law()  # assumed of the baseline ...
    efficiency_factor: Positive = 10.0  # ... and that the others need this many times fewer tokens
    baseline: Family = "transformer"
    n_slots: Count | None = None  # workers that run at once; None: as many as the largest cell has
    noise: Positive = 0.005  # standard deviation of ln L between runs that differ in their seed
