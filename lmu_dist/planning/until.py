"""The rule by which a ladder stops early: targets and results in, a `Verdict` out, and the cells of the next wave.

A ladder stops when the 90 % interval of everything that is asked is within its ratio, when the budget is spent, or when all
planned cells are done. An interval that is estimated again and again is narrow by chance at times, and stopping then selects
those moments. benchmarks/until.py shows how often intervals contain the truth at the stop, with the precautions below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmu_dist.config import Config, ConfigError
from lmu_dist.models import registry
from lmu_dist.planning.cost import read_calibration, vocab_tokens
from lmu_dist.planning.design import Knowledge, PlannedCell, Question, same_size
from lmu_dist.planning.estimate import estimate
from lmu_dist.planning.first_cells import MIN_RUNS, MIN_VALUES
from lmu_dist.planning.grid import grid
from lmu_dist.planning.learn import assume
from lmu_dist.planning.next_cell import Choice, next_cells
from lmu_dist.planning.plan_rows import cells_of_grid
from lmu_dist.planning.prices import total_cost
from lmu_dist.scaling.intervals import Interval
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.run_losses import RunLoss

MIN_FREEDOM = 12  # degrees of freedom of the noise before a ladder may stop


@dataclass(frozen=True)
class Target:
    """A question, and the ratio of the ends of its interval at which it is answered."""

    question: Question
    ratio: float


@dataclass(frozen=True)
class Verdict:
    """How a target stands. `reason` says why there is no interval, or why it is too early to trust it.

    `remark`: where the interval comes from, if not from laws.
    """

    target: Target
    value: float
    interval: Interval | None
    reason: str
    remark: str = ""

    @property
    def reached(self) -> bool:
        """Whether the interval is within its ratio."""
        return self.interval is not None and not self.reason and self.interval[1] <= self.target.ratio * self.interval[0]

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.target.question}: {self.reason}"
        low, high = self.interval
        notes = "".join(f"; {note}" for note in (self.reason, self.remark) if note)
        return f"{self.target.question}: {self.value:.3g} ({low:.3g} to {high:.3g}, a ratio of {high / low:.3g}){notes}"


def targets_of(config: Config, plan: Sequence[PlannedCell]) -> list[Target]:
    """The targets of ladder.until. Raises ConfigError if the planned cells cannot answer them."""
    assert config.ladder is not None
    if (until := config.ladder.until) is None:
        return []
    families = list(dict.fromkeys(cell.family for cell in plan))
    if until.hours is not None and any(cell.step_hours is None for cell in plan):
        raise ConfigError(
            "ladder.until.hours: step times are unknown; set plan.flops_per_second or run lmu-dist plan --calibrate"
        )
    targets = list[Target]()
    if until.factor is not None:
        base = registry.find(config.plan.baseline).name
        if base not in families or len(families) < 2:
            raise ConfigError(
                f"ladder.until.factor: the factor compares families with plan.baseline={base}; the ladder has "
                f"{', '.join(families)}"
            )
        for family in families:
            if family != base:
                targets.append(Target(Question("factor", family, base, largest_common_size(plan, base, family)), until.factor))
    for kind, ratio in (("alpha", until.alpha), ("beta", until.beta)):
        targets += [Target(Question(kind, family), ratio) for family in families if ratio is not None]
    for family in dict.fromkeys(family for target in targets for family in target.question.families):
        _check_can_have_a_law([cell for cell in plan if cell.family == family], family)
    return targets


def largest_common_size(plan: Sequence[PlannedCell], base: str, family: str) -> int:
    """The largest size that two families of a plan have. Raises ConfigError if there is none."""
    sizes = {name: sorted({cell.n_params for cell in plan if cell.family == name}) for name in (base, family)}
    common = [min(a, b) for a in sizes[base] for b in sizes[family] if same_size(a, b)]
    if not common:
        raise ConfigError(f"{family} and {base} have no size in common, so there is no factor between them")
    return common[-1]


def _check_can_have_a_law(cells: Sequence[PlannedCell], family: str) -> None:
    for what, values in (("sizes", {cell.n_params for cell in cells}), ("token budgets", {cell.tokens for cell in cells})):
        if len(values) < MIN_VALUES:
            raise ConfigError(f"ladder.until: a law needs {MIN_VALUES} {what}, and the plan has {len(values)} for {family}")
    if len(cells) < MIN_RUNS:
        raise ConfigError(
            f"ladder.until: a law needs {MIN_RUNS} runs, and the plan has {len(cells)} of {family}; add sizes, budgets or seeds"
        )


def judge(knowledge: Knowledge, targets: Sequence[Target]) -> list[Verdict]:
    """How every target stands."""
    verdicts = list[Verdict]()
    for target in targets:
        found = estimate(knowledge, target.question)
        reason = found.reason or found.early
        if found.interval is not None and found.freedom < MIN_FREEDOM:
            reason = f"the noise has only {found.freedom} degrees of freedom, of {MIN_FREEDOM} that stopping needs"
        verdicts.append(Verdict(target, found.value, found.interval, reason, found.remark))
    return verdicts


def next_wave(
    knowledge: Knowledge,
    verdicts: Sequence[Verdict],
    plan: Sequence[PlannedCell],
    missing: Sequence[PlannedCell],
    is_full: Callable[[Sequence[PlannedCell]], bool],
    per: str = "flops",
    limit: float = np.inf,
) -> list[Choice]:
    """The cells of the next wave, for the targets that are not reached; empty if no missing cell fits the budget.

    `is_full` says whether cells fill the cluster. A wave ends earlier if the targets are expected to be reached by it.
    """
    unmet = [verdict.target for verdict in verdicts if not verdict.reached]
    goal = float(np.exp(np.mean([np.log(np.log(target.ratio)) for target in unmet]))) if unmet else 0.0

    def is_enough(choices: Sequence[Choice]) -> bool:
        after = choices[-1].ratio_after
        expected = after is not None and float(np.log(after)) <= goal and knowledge.freedom + len(choices) >= MIN_FREEDOM
        return expected or is_full([choice.cell for choice in choices])

    return next_cells(knowledge, [target.question for target in unmet], plan, missing, per, is_enough, limit)


@dataclass(frozen=True)
class Course:
    """What a ladder with `until` is expected to train, if the assumed law and noise are true."""

    n_cells: int
    n_planned: int
    flops_share: float  # of the FLOPs of all planned cells
    reached: bool

    def line(self) -> str:
        """The expectation as a line of text."""
        if not self.reached:
            return "until: the targets are not expected to be reached before all cells are trained or the budget is spent"
        return (
            f"until: may stop early, by the assumed law and noise after {self.n_cells} of {self.n_planned} cells and "
            f"{self.flops_share:.0%} of the FLOPs"
        )


def expected_course(config: Config) -> Course | None:
    """What ladder.until is expected to save; None without it. Raises ConfigError, as `targets_of` does."""
    if config.ladder is None or config.ladder.until is None:
        return None
    planned = cells_of_grid(grid(config, vocab_tokens(config))[0], read_calibration(config.storage_folder))
    targets, until = targets_of(config, planned), config.ladder.until
    base_law, factor = assumed_law(config), config.plan.efficiency_factor
    other_law = replace(base_law, B=base_law.B * factor**-base_law.beta)
    baseline, per = registry.find(config.plan.baseline).name, "hours" if until.hours else "flops"
    families = list(dict.fromkeys(cell.family for cell in planned))
    laws = {family: base_law if family == baseline else other_law for family in families}
    done, budget = list[PlannedCell](), until.hours or until.flops or np.inf
    while True:
        results = [
            RunLoss(c.family, c.n_params, c.tokens, float(laws[c.family].loss(c.n_params, c.tokens)), c.group) for c in done
        ]
        knowledge = assume(results, laws, config.plan.noise)
        verdicts, keys = judge(knowledge, targets), {cell.key for cell in done}
        reached = all(verdict.reached for verdict in verdicts)
        missing = [cell for cell in planned if cell.key not in keys]
        n_least = max(config.plan.n_slots or 1, wave_size(len(done)))
        wave = (
            []
            if reached or not missing
            else next_wave(
                knowledge,
                verdicts,
                planned,
                missing,
                lambda chosen, n=n_least: len(chosen) >= n,
                per,
                budget - total_cost(done, per),
            )
        )
        if not wave:
            return Course(len(done), len(planned), total_cost(done, "flops") / total_cost(planned, "flops"), reached)
        done += [choice.cell for choice in wave]


def assumed_law(config: Config) -> Chinchilla:
    """The law of plan.law."""
    law = config.plan.law
    return Chinchilla(E=law.E, A=law.A, B=law.B, alpha=law.alpha, beta=law.beta)


def wave_size(n_done: int) -> int:
    """The fewest cells of a wave: it grows with the cells that have ended, so that there are not too many waves."""
    return max(1, n_done // 8)
