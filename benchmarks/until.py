"""Measures what `ladder.until` costs, and how often intervals contain the truth at the moment at which it stops.

Prints one JSON line per design and target:

    .venv/bin/python benchmarks/until.py --studies 200

A study has two families on one grid of sizes, budgets and seeds; a token of the second is worth four tokens of the first. The
targets are multiples (`width`) of the interval that the full grid is expected to give, whose ends have the ratio `full_ratio`.
`cost` is the share of the full grid's FLOPs that was spent at the stop; a ladder that never stopped has spent all of them. To
save time, fits start at the true laws. `covered` is the share of the intervals that contain the truth at the stop, and
`report_covered` that of the intervals that the report computes from the same runs, by bootstrap. In the design `wrong form` the
losses follow another law than Chinchilla's, so that in the end intervals come from measured curves (`by_curves`: their share);
the report's are then the same, and a bootstrap of laws has nothing to compare. Its factor is the same at all losses: at
which losses a ladder compares when it stops is not tested here. In `shared trunks` runs of a seed share most of their error.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lmu_dist.planning.design import MARGIN, Knowledge, PlannedCell, Question
from lmu_dist.planning.learn import assume, learn, rows_of
from lmu_dist.planning.prices import total_cost
from lmu_dist.planning.until import Target, judge, next_wave
from lmu_dist.scaling.curve_factor import loss_weights
from lmu_dist.scaling.efficiency import SeedNoise, factor_from_laws, lower_envelope
from lmu_dist.scaling.fit import Fit, fit, refit, unitless_values
from lmu_dist.scaling.flexible_laws import Gamma
from lmu_dist.scaling.intervals import Interval
from lmu_dist.scaling.laws import Chinchilla, ScalingLaw
from lmu_dist.scaling.published import HOFFMANN
from lmu_dist.scaling.run_losses import RunLoss
from lmu_dist.scaling.table import Rows, rows_from_columns
from lmu_dist.scaling.trunk_noise import reach
from lmu_dist.scaling.validate import FitResult, fit_and_validate

BASE, NEW = "transformer", "lmu"
FAMILIES = (BASE, NEW)
FACTOR = 4.0
LAWS: Mapping[str, Chinchilla] = {  # of small models
    BASE: Chinchilla(E=1.6, A=14.0, B=55.0, alpha=0.30, beta=0.29),
    NEW: Chinchilla(E=1.6, A=13.0, B=55.0 * FACTOR**-0.29, alpha=0.30, beta=0.29),
}
GAMMA = Gamma(E=1.0, A=150.0, B=3000.0, alpha=0.45, beta=0.5, gamma=0.6)
OF_ANOTHER_FORM: Mapping[str, ScalingLaw] = {BASE: GAMMA, NEW: replace(GAMMA, B=GAMMA.B * FACTOR**-GAMMA.beta)}


@dataclass(frozen=True)
class Design:
    """A planned grid and the truth about it.

    `shared` is the share of the variance that the runs of a trunk have in common. The plan offers `offered` seeds, by default
    `seeds`; it is compared with the grid of `seeds`.
    """

    n_params: Sequence[float]
    tokens: Sequence[float]
    seeds: int
    noise: float
    shared: float = 0.0
    slots: int = 4
    offered: int = 0
    has_wrong_form: bool = False

    @property
    def laws(self) -> Mapping[str, ScalingLaw]:
        """The true laws of the families."""
        return OF_ANOTHER_FORM if self.has_wrong_form else LAWS


SMALL, BUDGETS = [3e3, 1e4, 3e4, 1e5, 3e5, 1e6], [3e5, 1e6, 3e6, 1e7, 3e7]
PAPER = [55e3, 110e3, 220e3, 450e3, 1e6]
DESIGNS = {
    "small, 0.3 %": Design(SMALL, BUDGETS, 3, 0.003),
    "small, 0.3 %, 8 seeds offered": Design(SMALL, BUDGETS, 3, 0.003, offered=8),
    "small, 0.5 %, 2 seeds": Design(SMALL, BUDGETS, 2, 0.005),
    "small, 0.3 %, half of it by trunk": Design(SMALL, BUDGETS, 3, 0.003, shared=0.5),
    "paper, 0.2 %": Design(PAPER, [4e8, 1.3e9, 4e9, 1.3e10], 3, 0.002),
    "wrong form, 0.3 %": Design(SMALL, BUDGETS, 3, 0.003, has_wrong_form=True),
    "wrong form, 0.3 %, shared trunks": Design(SMALL, BUDGETS, 3, 0.003, shared=0.9, has_wrong_form=True),
}


@dataclass(frozen=True)
class Stop:
    """What stood when a ladder stopped: whether by its target, and the cost as a share of the full grid's."""

    reached: bool
    cost: float
    n_cells: int
    n_waves: int
    ratio: float | None
    covers: bool | None
    by_curves: bool
    report_covers: bool | None  # the interval of the report's bootstrap


def planned_cells(design: Design) -> list[PlannedCell]:
    """The cells of a grid, cheapest first. A step has 256 tokens; 20 % of the steps are the decay."""
    cells = list[PlannedCell]()
    for family in FAMILIES:
        for n in design.n_params:
            for seed in range(design.offered or design.seeds):
                for d in design.tokens:
                    steps = int(d // 256)
                    name = f"{family}-{n:g}-{d:g}-s{seed}"
                    trunk = f"{family}-{n:g}-s{seed}"
                    cells.append(
                        PlannedCell(name, name, family, int(n), steps * 256, seed, trunk, steps, int(0.8 * steps), 6 * n * 256)
                    )
    return sorted(cells, key=lambda cell: cell.steps * cell.step_flops)


def simulate(design: Design, cells: Sequence[PlannedCell], seed: int) -> dict[str, RunLoss]:
    """The losses of all planned cells, by key."""
    rng = np.random.default_rng(seed)
    of_trunk = defaultdict[str, float](lambda: float(rng.normal()))
    results = dict[str, RunLoss]()
    for cell in cells:
        z = np.sqrt(design.shared) * of_trunk[cell.trunk] + np.sqrt(1 - design.shared) * rng.normal()
        loss = float(design.laws[cell.family].loss(cell.n_params, cell.tokens) * np.exp(design.noise * z))
        results[cell.key] = RunLoss(cell.family, cell.n_params, cell.tokens, loss, cell.group)
    return results


def expected_ratio(question: Question, cells: Sequence[PlannedCell], design: Design) -> float:
    """Upper over lower end of the interval that the full grid is expected to give, from the true laws and noise."""
    laws = design.laws
    losses = [float(laws[c.family].loss(c.n_params, c.tokens)) for c in cells]
    results = [RunLoss(c.family, c.n_params, c.tokens, loss, c.group) for c, loss in zip(cells, losses, strict=True)]
    if design.has_wrong_form:
        at_size = [[r for r in results if r.family == f and r.n_params == question.n_params] for f in question.families]
        curves = [lower_envelope([r.tokens for r in runs], [r.loss for r in runs]) for runs in at_size]
        variance = sum(
            design.shared * weights.sum() ** 2 + (1 - design.shared) * weights @ weights
            for weights in loss_weights(curves[0], curves[1])
        )
        freedom = len({r.group for r in results}) * (design.seeds - 1) // design.seeds
        return float(np.exp(2 * MARGIN * reach(SeedNoise(design.noise * float(np.sqrt(variance / design.seeds)), freedom))))
    truth = assume(results, {family: LAWS[family] for family in question.families}, design.noise, design.shared)
    interval = truth.interval(question)[1]
    assert interval is not None
    return interval[1] / interval[0]


def run_study(design: Design, kind: str, multiples: Sequence[float], seed: int, n_resamples: int) -> list[Stop]:
    """One study: the ladder goes on from the widest target to the narrowest; what stands at the stop for each of them."""
    cells = planned_cells(design)
    losses = simulate(design, cells, seed)
    question = question_of(design, kind)
    cells = [cell for cell in cells if cell.family in question.families]
    starts = nearest_laws(cells, design) if design.has_wrong_form else LAWS
    grid = [cell for cell in cells if cell.seed < design.seeds]
    full_ratio, total = expected_ratio(question, grid, design), total_cost(grid, "flops")
    targets = [Target(question, float(np.exp(m * np.log(full_ratio)))) for m in sorted(multiples, reverse=True)]
    done, waves, stops = list[PlannedCell](), 0, list[Stop]()
    while targets:
        keys = {cell.key for cell in done}
        missing = [cell for cell in cells if cell.key not in keys]
        results = [losses[cell.key] for cell in done]
        knowledge = learn(results, question.families, HOFFMANN, 0.005, partial(fit_from, starts))
        verdict = judge(knowledge, targets[:1])[0]
        if verdict.reached or not missing:
            stops.append(
                Stop(
                    reached=verdict.reached,
                    cost=total_cost(done, "flops") / total,
                    n_cells=len(done),
                    n_waves=waves,
                    ratio=verdict.interval[1] / verdict.interval[0] if verdict.interval else None,
                    covers=contains(verdict.interval, knowledge, question, design),
                    by_curves=bool(verdict.remark),
                    report_covers=contains(
                        report_interval(knowledge, question, 0 if design.has_wrong_form else n_resamples),
                        knowledge,
                        question,
                        design,
                    ),
                )
            )
            targets = targets[1:]
            continue
        n_least = max(design.slots, len(done) // 8)

        def is_full(chosen: Sequence[PlannedCell], n_least: int = n_least) -> bool:
            return len(chosen) >= n_least and len({cell.trunk for cell in chosen}) >= design.slots

        done += [choice.cell for choice in next_wave(knowledge, [verdict], cells, missing, is_full)]
        waves += 1
    return stops


def nearest_laws(cells: Sequence[PlannedCell], design: Design) -> Mapping[str, Chinchilla]:
    """The laws of Chinchilla's form that are nearest to the true ones on all planned cells."""
    found = dict[str, Chinchilla]()
    for family, law in design.laws.items():
        n, d = zip(*((c.n_params, c.tokens) for c in cells if c.family == family), strict=True)
        nearest = fit(Chinchilla, rows_from_columns(n, d, law.loss(n, d))).law
        assert isinstance(nearest, Chinchilla)
        found[family] = nearest
    return found


def fit_from(starts: Mapping[str, Chinchilla], family: str, rows: Rows) -> Fit:
    """The fit that starts at the true law, which is 20 times as fast as one from several starts and ends at its optimum."""
    fitted = refit(starts[family], rows)
    return replace(fitted, start_optima=2 * ((fitted.minimised_objective, unitless_values(fitted.law)),))


def question_of(design: Design, kind: str) -> Question:
    """The factor at the largest size, or an exponent of the base family."""
    return Question("factor", NEW, BASE, n_params=max(design.n_params)) if kind == "factor" else Question(kind, BASE)


def contains(interval: Interval | None, knowledge: Knowledge, question: Question, design: Design) -> bool | None:
    """Whether an interval contains the truth; None without an interval. The factor is compared at the same loss."""
    if interval is None:
        return None
    if design.has_wrong_form:
        return interval[0] <= FACTOR <= interval[1]  # at every loss
    if question.kind != "factor":
        return interval[0] <= getattr(LAWS[question.family], question.kind) <= interval[1]
    loss = knowledge.compared_loss(question)
    assert loss is not None
    base, new = (LAWS[family].tokens_for(loss, question.n_params) for family in question.families)
    return bool(interval[0] <= base / new <= interval[1])


def report_interval(knowledge: Knowledge, question: Question, n_resamples: int) -> Interval | None:
    """The interval that the report shows at the stop, by bootstrap."""
    if not n_resamples:
        return None
    fits = list[FitResult]()
    for family in question.families:
        rows = rows_of(knowledge.results, family)
        fits.append(
            fit_and_validate(
                Chinchilla, rows, [r.group.split("/", 1)[1] for r in knowledge.results if r.family == family], n_resamples
            )
        )
    if any(result.law is None for result in fits):
        return None
    if question.kind != "factor":
        return fits[0].intervals[question.kind]
    laws = [result.law for result in fits]
    tokens = [knowledge.tokens_at(family, question.n_params) for family in question.families]
    pairs = list(zip(*(result.laws for result in fits), strict=True))
    ranges = [(float(min(d)), float(max(d))) for d in tokens]
    correction = max(result.correction for result in fits)
    return factor_from_laws(*laws, question.n_params, tuple(ranges), pairs, correction).interval  # pyright: ignore


def summary(stops: Sequence[Stop], n_cells: int) -> dict[str, float | int | None]:
    """The means over studies."""

    def mean(values: Iterable[float | bool | None]) -> float | None:
        known = [float(value) for value in values if value is not None]
        return round(float(np.mean(known)), 3) if known else None

    return {
        "stopped": sum(stop.reached for stop in stops),
        "cost": mean(stop.cost for stop in stops),
        "worst_cost": round(max(stop.cost for stop in stops), 3),
        "cells": mean(stop.n_cells / n_cells for stop in stops),
        "waves": mean(stop.n_waves for stop in stops),
        "ratio": mean(stop.ratio for stop in stops),
        "covered": mean(stop.covers for stop in stops),
        "by_curves": mean(stop.by_curves for stop in stops),
        "report_covered": mean(stop.report_covers for stop in stops),
        "report_of": sum(stop.report_covers is not None for stop in stops),
    }


def main() -> None:
    """Runs the selected designs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--designs", nargs="*", default=list(DESIGNS), choices=list(DESIGNS))
    parser.add_argument("--asked", nargs="*", default=["factor", "alpha"], choices=["factor", "alpha", "beta"])
    parser.add_argument("--widths", nargs="*", type=float, default=[1.0, 1.25, 1.5])
    parser.add_argument("--resamples", type=int, default=200, help="of the report's bootstrap; 0: no bootstrap")
    parser.add_argument("--quick", action="store_true", help="three studies of the first design, without a bootstrap")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.studies, arguments.resamples, arguments.designs = 3, 0, arguments.designs[:1]
        arguments.asked, arguments.widths = arguments.asked[:1], [1.5]
    for name in arguments.designs:
        design = DESIGNS[name]
        for kind in arguments.asked:
            started_at, question = time.monotonic(), question_of(design, kind)
            studies = [
                run_study(design, kind, arguments.widths, seed, arguments.resamples) for seed in range(arguments.studies)
            ]
            cells = [cell for cell in planned_cells(design) if cell.family in question.families and cell.seed < design.seeds]
            for i, width in enumerate(sorted(arguments.widths, reverse=True)):
                line = {"design": name, "asked": kind, "width": width, "studies": len(studies)}
                line["full_ratio"] = round(expected_ratio(question, cells, design), 3)
                print(json.dumps(line | summary([stops[i] for stops in studies], len(cells))), flush=True)
            print(f"{time.monotonic() - started_at:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
