"""All that a study says, in one value: collected runs in, fits, factors and an answer out. The report shows it, results.json
is it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling import positions
from lmu_dist.scaling.collect import Run, Study, labels, rows, title
from lmu_dist.scaling.compute import Convention, conventions
from lmu_dist.scaling.efficiency import (
    Curve,
    Factor,
    Improvement,
    SeedNoise,
    curve,
    from_curves,
    from_laws,
    improvement,
    seed_noise,
)
from lmu_dist.scaling.examine import Examination, examine
from lmu_dist.scaling.intervals import N_RESAMPLES, Interval, around, weights
from lmu_dist.scaling.laws import Chinchilla, Floats

CLAIM = 10.0  # times the tokens, as the paper has it
UNKNOWN = "Not determined"
BASE, NEW, WORST = "transformer", "lmu", "lstm"

Curves = Mapping[str, Floats]  # run id: loss at positions 1 .. n


@dataclass(frozen=True)
class FamilyFit:
    """The law of a family, and what the four ways of counting make of it."""

    family: str
    examination: Examination
    conventions: tuple[Convention, ...]
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class AtSize:
    """The factor at one size: between the curves seen there, and between the laws of all sizes."""

    n_params: int
    curves: Factor
    laws: Factor


@dataclass(frozen=True)
class Comparison:
    """A new family against a base, at every size both have. `growth`: by what tenfold N multiplies the laws' factor."""

    base: str
    new: str
    sizes: tuple[AtSize, ...]
    growth: float | None
    growth_interval: Interval | None
    remark: str


@dataclass(frozen=True)
class Position:
    """Loss by position for a family and size at its largest budget, seeds averaged."""

    family: str
    n_params: int
    tokens: int
    n_seeds: int
    losses: tuple[float, ...]
    flat_from: int | None


@dataclass(frozen=True)
class ByPosition:
    """The factor of the comparison asked for, by position, at one size. Only where seed noise is known: bins are noisy."""

    n_params: int
    bins: tuple[tuple[int, int, Factor], ...]


@dataclass(frozen=True)
class Answer:
    """What a reader takes home: a word, a sentence, and what it rests on. `factor` may be unknown."""

    verdict: str
    sentence: str
    n_params: int | None
    factor: Factor | None
    source: str  # laws | curves | none
    growth: str
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """Everything the report shows."""

    answer: Answer
    fits: tuple[FamilyFit, ...]
    comparisons: tuple[Comparison, ...]
    improvement: Improvement
    noise: SeedNoise | None
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
    comparisons = tuple(_compare(study, laws, base, new, noise) for new in study.families if new != base)
    asked = next((c for c in comparisons if (c.base, c.new) == (BASE, NEW)), None)
    return Results(
        answer=_answer(study, asked, noise),
        fits=fits,
        comparisons=comparisons,
        improvement=_improvement(study, n_resamples),
        noise=noise,
        positions=tuple(_positions(study, curves)),
        by_position=_by_position(study, curves, noise) if noise else None,
    )


def at_size(study: Study, family: str, rung: int) -> Curve:
    """Loss against tokens of a family at a size."""
    runs = study.of(family, rung)
    return curve([r.record.tokens for r in runs], [r.record.val_loss_nats for r in runs])


def _fit(study: Study, family: str, n_resamples: int) -> FamilyFit:
    runs = study.of(family)
    seen = examine(Chinchilla, rows(runs), labels(runs), n_resamples)
    return FamilyFit(family, seen, tuple(conventions(runs)), tuple(run.run_id for run in runs))


def _cells(runs: Sequence[Run]) -> list[list[float]]:
    groups = defaultdict[tuple[str, int, int, float], list[float]](list)
    for run in runs:
        r = run.record
        groups[r.family, run.rung, r.planned_tokens, r.learning_rate].append(r.val_loss_nats)
    return list(groups.values())


def _compare(study: Study, laws: Mapping[str, Examination], base: str, new: str, noise: SeedNoise | None) -> Comparison:
    b, w = laws[base].law, laws[new].law
    pairs, widen = list(zip(laws[base].laws, laws[new].laws, strict=False)), max(laws[base].widen, laws[new].widen)
    sizes, series, drawn = list[AtSize](), list[tuple[float, float]](), list[Floats]()
    for rung in (n for n in study.rungs if study.of(base, n) and study.of(new, n)):
        seeds = tuple(len({run.record.seed for run in study.of(family, rung)}) for family in (base, new))
        curves = from_curves(at_size(study, base, rung), at_size(study, new, rung), noise, (seeds[0], seeds[1]))
        fitted = Factor(
            None, None, None, None, None, f"the law of {base if not isinstance(b, Chinchilla) else new} is not determined"
        )
        if isinstance(b, Chinchilla) and isinstance(w, Chinchilla):
            tokens = [[run.record.tokens for run in study.of(family, rung)] for family in (base, new)]
            seen = ((float(min(tokens[0])), float(max(tokens[0]))), (float(min(tokens[1])), float(max(tokens[1]))))
            fitted = from_laws(b, w, rung, seen, pairs, widen)  # pyright: ignore
            if fitted.value and fitted.losses:
                middle = float(np.sqrt(np.prod(fitted.losses)))
                series.append((np.log10(rung), np.log(fitted.value)))
                drawn.append(np.array([np.log(x.tokens_for(middle, rung) / y.tokens_for(middle, rung)) for x, y in pairs]))  # pyright: ignore
        sizes.append(AtSize(rung, curves, fitted))
    if len(series) < 2:
        return Comparison(base, new, tuple(sizes), None, None, "fewer than two sizes have a factor between laws")
    x, y = np.array(series).T
    growth = float(np.exp(_slope(x, y)))
    interval = around(growth, np.exp(_slope(x, np.array(drawn))), widen) if len(pairs) else None
    return Comparison(
        base, new, tuple(sizes), growth, interval, "" if interval else "too few resamples have a factor at all sizes"
    )


def _slope(x: Floats, y: Floats) -> Floats:
    """Least-squares slope along the first axis."""
    centred = x - x.mean()
    return centred @ y / (centred @ centred)


def _improvement(study: Study, n_resamples: int) -> Improvement:
    losses = defaultdict[tuple[int, int, int], dict[str, Run]](dict)
    for run in study.runs:
        losses[run.rung, run.record.planned_tokens, run.record.seed][run.record.family] = run
    common = [cell for cell in losses.values() if all(name in cell for name in (NEW, BASE, WORST))]
    table = [[cell[name].record.val_loss_nats for name in (NEW, BASE, WORST)] for cell in common]
    drawn = weights(labels([cell[NEW] for cell in common]), n_resamples) if common else None
    return improvement(np.array(table), drawn)


def _positions(study: Study, curves: Curves) -> list[Position]:
    groups = defaultdict[tuple[str, int], list[Run]](list)
    for run in largest_budgets(study):
        if run.run_id in curves:
            groups[run.record.family, run.rung].append(run)
    found = []
    for (family, rung), runs in groups.items():
        mean = np.mean([curves[run.run_id] for run in runs], axis=0)
        level = positions.flat_from(positions.binned(mean))
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


def _answer(study: Study, asked: Comparison | None, noise: SeedNoise | None) -> Answer:
    caveats = _caveats(study, noise)
    if asked is None or not asked.sizes:
        missing = [title(name) for name in (NEW, BASE) if name not in study.families]
        why = f"no finished run of {' or '.join(missing)}" if missing else "they have no size in common"
        return Answer(UNKNOWN, f"The study cannot say: {why}.", None, None, "none", "", caveats)
    n, factor, source = _headline(asked)
    if factor is None:
        last = asked.sizes[-1]
        sense, limit = last.curves.bound or ("", 0.0)
        known = f"more than {_round(limit)}" if sense == ">" else f"less than {_round(limit)}"
        told = f"At N = {last.n_params:,} the factor is {known}: {last.curves.remark}."
        return Answer(UNKNOWN, told, last.n_params, last.curves, "curves", _growth(asked), caveats)
    assert factor.value is not None
    times = (
        f"At N = {n:,} the {title(BASE)} needs {_round(factor.value)} times the tokens of the {title(NEW)} for the same loss"
    )
    if factor.interval is None:
        said = f"{times}, as far as one can see; without an interval, since {factor.remark}, that decides nothing."
        return Answer(UNKNOWN, said, n, factor, source, _growth(asked), caveats)
    low, high = factor.interval
    verdict = "More than ten" if low > CLAIM else "Less than ten" if high < CLAIM else "Ten is possible"
    fewer = " That it needs fewer is as possible as that it needs more." if low < 1 < high else ""
    said = f"{times}; 90 % interval {_round(low)} to {_round(high)}, from {source}.{fewer}"
    return Answer(verdict, said, n, factor, source, _growth(asked), caveats)


def _headline(asked: Comparison) -> tuple[int, Factor | None, str]:
    """The best-founded factor of the largest size: of laws if they have an interval, else of curves, else none."""
    for pick, source in ((lambda s: s.laws, "laws"), (lambda s: s.curves, "curves")):
        for need_interval in (True, False):
            for size in reversed(asked.sizes):
                factor = pick(size)
                good = factor.interval is not None if need_interval else source == "curves"
                if factor.known and good:
                    return size.n_params, factor, source
    return asked.sizes[-1].n_params, None, "none"


def _growth(asked: Comparison) -> str:
    if asked.growth is None or asked.growth_interval is None:
        return f"Whether it holds as models grow is not determined: {asked.remark}."
    low, high = asked.growth_interval
    sense = "It grows with the model" if low > 1 else "It shrinks as models grow" if high < 1 else "No change with size is seen"
    first, last = asked.sizes[0].n_params, asked.sizes[-1].n_params
    times = f"tenfold N multiplies the factor by {asked.growth:.2f} ({low:.2f} to {high:.2f})"
    return f"{sense}: {times}, between N = {first:,} and {last:,}."


def _caveats(study: Study, noise: SeedNoise | None) -> tuple[str, ...]:
    sizes, tokens = study.rungs, [run.record.tokens for run in study.runs]
    budgets = f"{min(tokens):,} to {max(tokens):,} tokens of {study.source}"
    seen = f"Seen: N from {sizes[0]:,} to {sizes[-1]:,}, {budgets}. Nothing is said beyond."
    if noise is None:
        return seen, "One seed: seed noise is unknown."
    return seen, f"Another seed changes a loss by {noise.deviation:.2%} ({noise.freedom} degrees of freedom)."


def _round(value: float) -> str:
    """Two digits or so, for sentences."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"
