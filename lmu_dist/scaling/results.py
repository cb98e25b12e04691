"""All that a study says in one value: collected runs in, fits, factors and an answer out. results.json and the page show it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling import positions
from lmu_dist.scaling.answer import BASE, NEW, WORST, Answer, answer
from lmu_dist.scaling.collect import Run, Study, labels, rows
from lmu_dist.scaling.compare import Comparison, compare
from lmu_dist.scaling.compute import Convention, conventions
from lmu_dist.scaling.efficiency import Factor, Improvement, SeedNoise, improvement, seed_noise
from lmu_dist.scaling.examine import Examination, examine
from lmu_dist.scaling.intervals import N_RESAMPLES, weights
from lmu_dist.scaling.laws import Chinchilla, Floats
from lmu_dist.scaling.positions import Level
from lmu_dist.scaling.sizes import InSize, power_law

Curves = Mapping[str, Floats]  # run id: loss at positions 1 .. n


@dataclass(frozen=True)
class FamilyFit:
    """The law of a family, and what the four ways of counting make of it."""

    family: str
    examination: Examination
    conventions: tuple[Convention, ...]
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Position:
    """Loss by position for a family and size at its largest budget, seeds averaged."""

    family: str
    n_params: int
    tokens: int
    n_seeds: int
    losses: tuple[float, ...]
    level: Level


@dataclass(frozen=True)
class ByPosition:
    """The factor of the comparison asked for, by position, at one size. Only where seed noise is known: bins are noisy."""

    n_params: int
    bins: tuple[tuple[int, int, Factor], ...]


@dataclass(frozen=True)
class Results:
    """Everything the report shows. `asked` is the comparison that the question is about, one of `comparisons`."""

    asked: Comparison | None
    answer: Answer
    fits: tuple[FamilyFit, ...]
    comparisons: tuple[Comparison, ...]
    improvement: Improvement
    noise: SeedNoise | None
    in_size: tuple[InSize, ...]
    positions: tuple[Position, ...]
    by_position: ByPosition | None


def largest_budgets(study: Study) -> list[Run]:
    """The runs whose loss by position the report shows: those of the largest budget of every family and size."""
    found = list[Run]()
    for family in study.families:
        for rung in study.rungs:
            runs = study.of(family, rung)
            most = max((run.record.planned_tokens for run in runs), default=0)
            found += [run for run in runs if run.record.planned_tokens == most]
    return found


def compared_by_position(study: Study) -> list[Run]:
    """The runs from which the factor by position is made: the two families asked about, at the largest size both have."""
    common = [n for n in study.rungs if study.of(BASE, n) and study.of(NEW, n)]
    return [run for family in (BASE, NEW) for run in study.of(family, common[-1])] if common else []


def analyse(study: Study, curves: Curves, n_resamples: int = N_RESAMPLES) -> Results:
    """From runs, and the loss by position of those that have one, to all results."""
    noise = seed_noise(_cells(study.runs))
    fits = tuple(_fit(study, family, n_resamples) for family in study.families)
    laws = {f.family: f.examination for f in fits}
    base = BASE if BASE in study.families else (study.families[-1])
    comparisons = tuple(compare(study, laws, base, new, noise) for new in study.families if new != base)
    asked = next((c for c in comparisons if (c.base, c.new) == (BASE, NEW)), None)
    return Results(
        asked=asked,
        answer=answer(study, asked, noise),
        fits=fits,
        comparisons=comparisons,
        improvement=_improvement(study, n_resamples),
        noise=noise,
        in_size=tuple(_in_size(study, family) for family in study.families),
        positions=tuple(_positions(study, curves)),
        by_position=_by_position(study, curves, noise) if noise else None,
    )


def _fit(study: Study, family: str, n_resamples: int) -> FamilyFit:
    runs = study.of(family)
    seen = examine(Chinchilla, rows(runs), labels(runs), n_resamples)
    return FamilyFit(family, seen, tuple(conventions(runs, seen)), tuple(run.run_id for run in runs))


def _cells(runs: Sequence[Run]) -> list[list[float]]:
    """Losses of cells that differ in the seed only."""
    groups = defaultdict[tuple[str, int, int], list[float]](list)
    for run in runs:
        groups[run.record.family, run.record.n_params, run.record.planned_tokens].append(run.record.val_loss_nats)
    return list(groups.values())


def _improvement(study: Study, n_resamples: int) -> Improvement:
    losses = defaultdict[tuple[int, int, int], dict[str, Run]](dict)
    for run in study.runs:
        losses[run.rung, run.record.planned_tokens, run.record.seed][run.record.family] = run
    common = [cell for cell in losses.values() if all(name in cell for name in (NEW, BASE, WORST))]
    table = [[cell[name].record.val_loss_nats for name in (NEW, BASE, WORST)] for cell in common]
    drawn = weights(labels([cell[NEW] for cell in common]), n_resamples) if common else None
    return improvement(np.array(table), drawn)


def _in_size(study: Study, family: str) -> InSize:
    runs = [run for run in largest_budgets(study) if run.record.family == family]
    most = max(run.record.planned_tokens for run in runs)
    losses = defaultdict[int, list[float]](list)
    for run in runs:
        if run.record.planned_tokens == most:
            losses[run.record.n_params].append(np.log(run.record.val_loss_nats))
    sizes = sorted(losses)
    means = np.exp([np.mean(losses[n]) for n in sizes])
    return power_law(family, most, np.array(sizes, np.float64), means)


def _positions(study: Study, curves: Curves) -> list[Position]:
    groups = defaultdict[tuple[str, int], list[Run]](list)
    for run in largest_budgets(study):
        if run.run_id in curves:
            groups[run.record.family, run.rung].append(run)
    found = []
    for (family, rung), runs in groups.items():
        mean = np.mean([curves[run.run_id] for run in runs], axis=0)
        level = positions.level_from(positions.binned(mean))
        tokens = runs[0].record.planned_tokens
        found.append(Position(family, rung, tokens, len(runs), tuple(float(v) for v in mean), level))
    return found


def _by_position(study: Study, curves: Curves, noise: SeedNoise) -> ByPosition | None:
    tables: dict[str, dict[int, list[Floats]]] = {BASE: defaultdict(list), NEW: defaultdict(list)}
    runs = [run for run in compared_by_position(study) if run.run_id in curves]
    for run in runs:
        tables[run.record.family][run.record.tokens].append(curves[run.run_id])
    if not tables[BASE] or not tables[NEW]:
        return None
    return ByPosition(runs[0].rung, tuple(positions.factors(tables[BASE], tables[NEW], noise)))
