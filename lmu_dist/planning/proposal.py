"""What `lmu-dist next` says: an experiment in MLflow and a question in, a `Proposal` with the ranked cells out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lmu_dist.config import AssumedLaw, ConfigError, PlanConfig
from lmu_dist.config.types import number
from lmu_dist.planning.design import Knowledge, PlannedCell, Question
from lmu_dist.planning.estimate import estimate
from lmu_dist.planning.learn import learn
from lmu_dist.planning.next_cell import Choice, next_cells
from lmu_dist.planning.plan_rows import from_rows
from lmu_dist.planning.until import largest_common_size
from lmu_dist.records import ENDED, RUNNING
from lmu_dist.scaling.appearance import family_order
from lmu_dist.scaling.collect import collect
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.pair import choose_pair
from lmu_dist.scaling.run_losses import RunLoss, losses_of
from lmu_dist.tracking.experiments import find_experiment
from lmu_dist.tracking.progress import rows
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import planned_baseline, read_plans

HEADER = ("cell", "N", "tokens", "cost", "interval now", "after it", "gain", "per {}", "why")


@dataclass(frozen=True)
class Proposal:
    """The ranked cells, what is known now, and notes for the user."""

    known: tuple[str, ...]
    choices: tuple[Choice, ...]
    per: str
    n_missing: int
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The proposal as lines of text: what is known now, and a table."""
        if not self.choices:
            return [*self.known, "all planned cells have ended or are running"]
        unit = "FLOP" if self.per == "flops" else "hour"
        table = [tuple(name.format(unit) for name in HEADER), *map(self._row, self.choices)]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADER) - 1)]
        text = ["  ".join([*(v.ljust(w) for v, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in table]
        return [*self.known, "", *text, "", f"{len(self.choices)} of {self.n_missing} cells that are planned and not started"]

    def to_json(self) -> dict[str, Any]:
        """The proposal for --json."""
        chosen = [
            {
                **asdict(choice.cell),
                "cost": choice.cost,
                "ratio_before": choice.ratio_before,
                "ratio_after": choice.ratio_after,
                "gain": choice.gain,
                "gain_per_cost": choice.gain_per_cost,
                "reason": choice.reason,
            }
            for choice in self.choices
        ]
        return {"known": self.known, "per": self.per, "missing": self.n_missing, "cells": chosen, "notes": self.notes}

    def _row(self, choice: Choice) -> tuple[str, ...]:
        cell, unit = choice.cell, "FLOPs" if self.per == "flops" else "h"
        known = choice.ratio_before is not None and choice.ratio_after is not None
        return (
            cell.name,
            f"{cell.n_params:,}",
            f"{cell.tokens:,}",
            f"{choice.cost:.3g} {unit}",
            f"{choice.ratio_before:.4g}" if known else "none",
            f"{choice.ratio_after:.4g}" if known else "none",
            f"{choice.gain:.2%}" if known else "",
            f"{choice.gain_per_cost:.2e}" if known else "",
            choice.reason,
        )


def propose(
    store: Store, experiment: str, ask: str, family: str | None, count: int, per: str, baseline: str | None = None
) -> Proposal:
    """Ranks the missing cells of an experiment's plan. Raises ConfigError if there is no plan, or it cannot answer.

    `baseline` is the base of factors; by default plan.baseline of the ladder, or what a report takes.
    """
    with store.one_line_errors():
        find_experiment(store, experiment)
    planned_rows = read_plans(store, experiment)
    plan = list({cell.key: cell for cell in from_rows(planned_rows)}.values())
    if not plan:
        why = "its plan was written by an earlier version" if planned_rows else "no ladder has written a plan into it"
        raise ConfigError(f"experiment {experiment!r}: {why}; start its ladder once (it may be interrupted), then ask again")
    if per == "hours" and any(cell.step_hours is None for cell in plan):
        raise ConfigError(
            "--per hours: step times are unknown; run lmu-dist plan --calibrate or set plan.flops_per_second, and start the "
            "ladder once"
        )
    questions = questions_of(plan, ask, family, baseline, planned_baseline(store, experiment))
    families = list(dict.fromkeys(f for question in questions for f in question.families))
    states = {row.key: row.state for row in rows(store, experiment)}
    n_running = sum(states.get(cell.key) == RUNNING for cell in plan)
    missing = [cell for cell in plan if states.get(cell.key) not in (*ENDED, RUNNING)]
    results, left_out = results_of(store, experiment)
    knowledge = learn(results, families, _default_law(), PlanConfig().noise)
    choices = next_cells(knowledge, questions, plan, missing, per, lambda chosen: len(chosen) >= count)[:count]
    notes = [f"{n_running} cells are running: they count as done without a result"] if n_running else []
    notes += [left_out] if left_out else []
    return Proposal(
        tuple(_known(knowledge, question) for question in questions), tuple(choices), per, len(missing), tuple(notes)
    )


def questions_of(
    plan: Sequence[PlannedCell], ask: str, family: str | None, baseline: str | None = None, planned: str | None = None
) -> list[Question]:
    """The questions of `--ask`, `--family` and `--baseline`. Raises ConfigError with what is allowed.

    `planned`: plan.baseline, for which no option is needed.
    """
    families = sorted({cell.family for cell in plan}, key=family_order)
    if family is not None and family not in families:
        raise ConfigError(f"--family {family}: the plan has {', '.join(families)}")
    if baseline is not None and ask != "factor":
        raise ConfigError(f"--baseline {baseline}: only --ask factor compares families, and --ask is {ask}; leave it out")
    kind, _, point = ask.partition("=")
    if kind in ("alpha", "beta") and not point:
        return [Question(kind, f) for f in families if family in (None, f)]
    if kind == "loss":
        values = [number(part.strip()) for part in point.split(",")]
        if len(values) != 2 or not all(isinstance(v, int | float) and v > 0 for v in values):
            raise ConfigError(f"--ask {ask}: give N and D as positive numbers, as in --ask loss=1e6,2e8")
        n_params, tokens = values
        return [Question("loss", f, n_params=float(n_params), tokens=float(tokens)) for f in families if family in (None, f)]
    if ask != "factor":
        raise ConfigError(f"--ask {ask}: must be factor, alpha, beta or loss=N,D")
    n_cells = {f: sum(cell.family == f for cell in plan) for f in families}
    base = families[0] if len(families) < 2 else choose_pair(n_cells, baseline, None, planned, "the plan has").base
    others = [f for f in families if f != base and family in (None, f)]
    if not others:
        raise ConfigError(f"--ask factor: the plan has {', '.join(families)}, and a factor needs a family besides {base}")
    return [Question("factor", f, base, n_params=largest_common_size(plan, base, f)) for f in others]


def results_of(store: Store, experiment: str) -> tuple[list[RunLoss], str]:
    """The results of the runs that a fit may use, and a note about those that were left out."""
    try:
        study = collect(store, experiment)
    except ConfigError:  # no finished run yet
        return [], ""
    results = losses_of(run.record for run in study.runs)
    unusable = [out for out in study.left_out if out.record is not None]
    reasons = dict.fromkeys(out.reason.split(":")[0] for out in unusable)
    return results, f"{len(unusable)} finished runs are not used: {', '.join(reasons)}" if unusable else ""


def _known(knowledge: Knowledge, question: Question) -> str:
    found = estimate(knowledge, question)
    if found.interval is None:
        return f"{question}: not determined ({found.reason})"
    low, high = found.interval
    noise = "" if found.remark else f"noise of ln L {knowledge.noise:.2%}, "
    notes = f"{noise}{found.freedom} degrees of freedom{found.remark and '; '}{found.remark}"
    return f"{question}: {found.value:.4g} (90 % interval {low:.4g} to {high:.4g}, a ratio of {high / low:.4g}; {notes})"


def _default_law() -> Chinchilla:
    law = AssumedLaw()
    return Chinchilla(E=law.E, A=law.A, B=law.B, alpha=law.alpha, beta=law.beta)
