"""All numbers of the study's text: tables of records in, one dictionary of JSON types out, for numbers.json and the template.

Every number is one that the report computes, by the same rules: `lmu-dist report --from runs.csv` prints them, too. Called by
make.py. Losses are in nats per token, sizes are N without embeddings, budgets are training tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmu_dist.config import AssumedLaw, PlanConfig
from lmu_dist.planning.design import Question
from lmu_dist.planning.estimate import estimate
from lmu_dist.planning.learn import learn
from lmu_dist.records import COMPLETE
from lmu_dist.report.forecasts import ForecastScores, score_forecasts
from lmu_dist.report.inputs import ReportInputs
from lmu_dist.scaling.answer import answer, best_known_factor
from lmu_dist.scaling.as_json import fit_to_json, to_json
from lmu_dist.scaling.bands import BandDifference
from lmu_dist.scaling.collect import Run, Study
from lmu_dist.scaling.compare import Comparison, SizeComparison, compare
from lmu_dist.scaling.efficiency import Factor, SeedNoise
from lmu_dist.scaling.intervals import CONFIDENCE
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.pair import FIRST_BASELINES, FIRST_FAMILIES, Pair
from lmu_dist.scaling.results import FamilyFit, Results, analyse, default_pair, factor_by_position
from lmu_dist.scaling.run_losses import losses_of
from lmu_dist.scaling.trunk_noise import TrunkNoise, reach
from lmu_dist.tracking.stored_runs import StoredRun, StoredRuns

VERSION = 1  # of numbers.json
HOUR_MS = 3_600_000


def study_pairs(families: Sequence[str]) -> list[Pair]:
    """The pairs whose factors the text may name: every family over the usual baselines, both LMUs over all other families."""
    wanted = [(base, new) for base in FIRST_BASELINES for new in families]
    wanted += [(base, new) for new in FIRST_FAMILIES for base in families]
    return [Pair(base, new) for base, new in dict.fromkeys(wanted) if base != new and {base, new} <= set(families)]


def study_comparisons(study: Study, results: Results) -> dict[str, Comparison]:
    """The factors of these pairs at all common sizes, by the name of the pair."""
    laws = {fit.family: fit.result for fit in results.fits}
    pairs = study_pairs(study.families)
    return {pair.name: compare(study, laws, pair.base, pair.new, results.noise) for pair in pairs}


def study_numbers(
    inputs: ReportInputs, results: Results, forecasts: ForecastScores, tuning: StoredRuns | None = None
) -> dict[str, Any]:
    """Returns all numbers. `tuning` has the runs of searches that are not runs of the study."""
    study, comparisons = inputs.study, study_comparisons(inputs.study, results)
    records = [run.record for run in study.runs]
    facts = {
        "version": VERSION,
        "digest": study.digest,
        "data_digest": records[0].data_digest,
        "source": study.source,
        "versions": study.versions,
        "level": CONFIDENCE,
        "families": list(study.families),
        "titles": {family: study.title(family) for family in study.families},
        "n_runs": len(records),
        "n_runs_of": {family: len(study.runs_of(family)) for family in study.families},
        "n_left_out": len(study.left_out),
        "left_out": study.left_out_counts(),
        "sizes": list(study.size_bins),
        "budgets": sorted({r.planned_tokens for r in records}),
        "n_seeds": len({r.seed for r in records}),
        "unique_tokens": records[0].unique_tokens,
        "vocab_tokens": records[0].vocab_tokens,
        "sequence_tokens": records[0].sequence_tokens,
        "most_epochs": max(r.epochs for r in records),
        "noise": vars(results.noise.overall) if results.noise.overall else None,
        "noise_by_budget": {str(tokens): vars(noise) for tokens, noise in results.noise.by_budget().items()},
        "answer": {"verdict": results.answer.verdict, "sentence": results.answer.sentence},
        "caveats": list(results.answer.caveats),
        "pairs": {name: _pair(inputs, results, comparison) for name, comparison in comparisons.items()},
        "laws": {fit.family: _law(fit) for fit in results.fits},
        "order": loss_order(study, results.noise),
        "largest": largest_differences(study, results.noise),
        "improvement": vars(results.improvement),
        "positions": [_position(p) for p in results.positions],
        "bands": bands_by_family(results),
        "forecasts": _forecasts(forecasts),
        "tuned": {"settings_per_size": dict(study.n_settings_tried), **_tuning(tuning)},
        "cost": {"runs": cost_of(inputs.stored.runs), "tuning": cost_of(tuning.runs if tuning else ())},
    }
    return to_json(facts)


def until_numbers(inputs: ReportInputs, n_resamples: int) -> dict[str, Any]:
    """Returns the numbers of a ladder of two families with `ladder.until`, and the factor by which it stopped."""
    study = inputs.study
    pair = default_pair(study, planned=inputs.stored.baseline)
    results = analyse(study, inputs.curves, n_resamples, pair)
    numbers = study_numbers(inputs, results, score_forecasts(study, ()))
    names = (
        "digest",
        "families",
        "n_runs",
        "n_left_out",
        "sizes",
        "budgets",
        "n_seeds",
        "noise",
        "noise_by_budget",
        "pairs",
        "laws",
        "cost",
    )
    assumed = AssumedLaw()
    law = Chinchilla(assumed.E, assumed.A, assumed.B, assumed.alpha, assumed.beta)
    knowledge = learn(losses_of(run.record for run in study.runs), study.families, law, PlanConfig().noise)
    found = estimate(knowledge, Question("factor", pair.new, pair.base, study.size_bins[-1]))
    low, high = found.interval or (None, None)
    stop = {"value": found.value, "low": low, "high": high, "side": "", "bound": None, "remark": found.remark}
    return {**{name: numbers[name] for name in names}, "stop": to_json(stop)}


def _pair(inputs: ReportInputs, results: Results, comparison: Comparison) -> dict[str, Any]:
    """The factors of a pair by size, whether they change with size, and the sentences that the report has for it."""
    study, pair = inputs.study, Pair(comparison.base, comparison.new)
    said = answer(study, comparison, results.noise, results.other_laws, pair)
    by_position = factor_by_position(study, inputs.curves, results.noise, pair) if results.noise.overall else None
    bins = by_position.bins if by_position else ()
    low, high = comparison.growth_interval or (None, None)
    return {
        "base": pair.base,
        "new": pair.new,
        "verdict": said.verdict,
        "sentence": said.sentence,
        "others": said.others,
        "growth_sentence": said.growth,
        "growth": {"value": comparison.growth, "low": low, "high": high, "source": comparison.growth_from},
        "sizes": {str(size.n_params): _size(size) for size in comparison.sizes},
        "by_position": [{"first": first, "last": last, **_factor(factor)} for first, last, factor in bins],
    }


def _size(size: SizeComparison) -> dict[str, Any]:
    factor, source = best_known_factor(size)
    named = {"n_params": size.n_params, "source": source if factor.known else "none"}
    return {**named, **_factor(factor), "curves": _factor(size.curves), "laws": _factor(size.laws)}


def _factor(factor: Factor) -> dict[str, Any]:
    (low, high), (side, bound) = factor.interval or (None, None), factor.bound or ("", None)
    top, bottom = factor.losses or (None, None)
    ends = {"low": low, "high": high, "side": side, "bound": bound, "top_loss": top, "bottom_loss": bottom}
    return {"value": factor.value, **ends, "remark": factor.remark}


def _law(fit: FamilyFit) -> dict[str, Any]:
    """Chinchilla's law of a family with its misfit, and the laws that its runs support."""
    names = ("determined", "parameters", "intervals", "n_rows", "holdout")
    facts = fit_to_json(fit.result, fit.run_ids)
    misfit = {name: getattr(fit.result.misfit, name, None) for name in ("typical_miss", "worst_miss", "structure", "p_value")}
    supported = [law.name for law in fit.comparison.supported] if fit.comparison.fits else []
    reasons = list(fit.result.diagnostics.reasons)
    return {**{name: facts[name] for name in names}, **misfit, "supported": supported, "reasons": reasons}


def loss_order(study: Study, noise: TrunkNoise) -> list[dict[str, Any]]:
    """The families by loss at equal N and D, the best first, for every size and budget that two families or more have.

    Intervals come from the noise between seeds at the cell's budget, pooled over families and sizes (Student's t). `behind` is
    the loss over that of the best family, minus 1; `tied`: the interval of this ratio includes the best family (None: the seed
    noise is unknown).
    """
    cells = defaultdict[tuple[int, int], dict[str, list[Run]]](lambda: defaultdict(list))
    for run in study.runs:
        cells[run.size_bin, run.budget_bin][run.record.family].append(run)
    return [
        {"n_params": n, "tokens": tokens, "families": _ordered(found, noise.at(tokens, n))}
        for (n, tokens), found in sorted(cells.items())
        if len(found) > 1
    ]


def largest_differences(study: Study, noise: TrunkNoise) -> dict[str, Any]:
    """By how much the loss of one family is below that of another at the largest N and D, for every pair that has both.

    `value` is 1 - L(new) / L(base), with the interval of the noise between seeds at these tokens; negative: the new family is
    worse.
    """
    n_params, tokens = max((run.size_bin, run.budget_bin) for run in study.runs)
    found = defaultdict[str, list[float]](list)
    for run in study.runs:
        if (run.size_bin, run.budget_bin) == (n_params, tokens):
            found[run.record.family].append(float(np.log(run.record.val_loss_nats)))
    below = dict[str, Any]()
    for pair in study_pairs(sorted(found)):
        new, base = found[pair.new], found[pair.base]
        value, of_run = float(np.mean(new) - np.mean(base)), noise.at(tokens, n_params)
        apart = reach(of_run) * np.sqrt(1 / len(new) + 1 / len(base)) if of_run else np.inf
        low, high = (-np.expm1([value + apart, value - apart])).tolist()
        below[pair.name] = {"value": float(-np.expm1(value)), "low": low if of_run else None, "high": high if of_run else None}
    return {"n_params": n_params, "tokens": tokens, "below": below}


def _ordered(found: dict[str, list[Run]], noise: SeedNoise | None) -> list[dict[str, Any]]:
    of_run = reach(noise) if noise else None
    means = {family: float(np.mean([np.log(r.record.val_loss_nats) for r in runs])) for family, runs in found.items()}
    order = sorted(means, key=lambda family: (means[family], family))
    best = order[0]
    rows = list[dict[str, Any]]()
    for family in order:
        n, behind = len(found[family]), means[family] - means[best]
        own = None if of_run is None else of_run / np.sqrt(n)
        apart = None if of_run is None else of_run * np.sqrt(1 / n + 1 / len(found[best]))
        ends = (None, None) if own is None else np.exp([means[family] - own, means[family] + own]).tolist()
        if apart is None or family == best:
            low, high = None, None
        else:
            low, high = np.expm1([behind - apart, behind + apart]).tolist()
        loss = {"family": family, "n_seeds": n, "loss": float(np.exp(means[family])), "low": ends[0], "high": ends[1]}
        tied = True if family == best else None if low is None else low <= 0
        rows.append({**loss, "behind": float(np.expm1(behind)), "behind_low": low, "behind_high": high, "tied": tied})
    return rows


def _position(position: Any) -> dict[str, Any]:
    named = {name: getattr(position, name) for name in ("family", "n_params", "tokens", "n_seeds")}
    return {**named, "level_from": position.level.position, "determined": position.level.determined}


def bands_by_family(results: Results) -> dict[str, Any]:
    """The falls of the loss between two bands of positions, by family and size; at 256 tokens the bands are the protocol's."""
    rows = defaultdict[str, dict[str, Any]](dict)
    for row in results.bands:
        flat = {"flat_from": row.flat.position, "hidden": row.flat.hidden}
        reference = {"reference": row.reference, "paired": _fall(row.paired) if row.paired else None}
        rows[row.family][str(row.n_params)] = {"n_seeds": row.n_seeds, **_fall(row.difference), **flat, **reference}
    return dict(rows)


def _fall(found: BandDifference) -> dict[str, Any]:
    low, high = found.interval or (None, None)
    ends = {"early": [found.early.first, found.early.last], "late": [found.late.first, found.late.last]}
    return {"value": found.value, "low": low, "high": high, "side": found.side, **ends}


def _forecasts(forecasts: ForecastScores) -> dict[str, Any]:
    """The scores over the first forecast of each cell, and each of these forecasts with its error."""
    scores = [
        {
            "family": score.forecast.family,
            "n_params": score.forecast.n_params,
            "tokens": score.forecast.trained_tokens,
            "predicted": score.forecast.loss_nats,
            "low": score.forecast.low_nats,
            "high": score.forecast.high_nats,
            "actual": score.actual_nats,
            "error": score.error,
            "inside": score.inside,
        }
        for score in forecasts.counted
    ]
    names = ("n_forecasts", "n_scored", "n_inside", "share_inside", "median_absolute_error")
    return {**{name: forecasts.to_json()[name] for name in names}, "scores": scores}


def _tuning(tuning: StoredRuns | None) -> dict[str, Any]:
    """How many trials each family and size had in searches, how they ended, and the losses of the complete ones by rate."""
    trials = defaultdict[str, dict[str, dict[str, int]]](lambda: defaultdict(lambda: defaultdict(int)))
    losses = defaultdict[str, dict[str, dict[str, float]]](lambda: defaultdict(dict))
    for run in tuning.runs if tuning else ():
        if run.record:
            size = run.params.get("model.n_params", str(run.record.n_params))
            trials[run.record.family][size][run.status] += 1
            if run.record.status == COMPLETE:
                losses[size][run.record.family][f"{run.record.learning_rate:.4g}"] = run.record.val_loss_nats
    return {
        "losses": {
            size: {family: dict(sorted(of.items(), key=lambda item: float(item[0]))) for family, of in families.items()}
            for size, families in sorted(losses.items(), key=lambda item: float(item[0]))
        },
        "trials": {
            family: {size: sum(ended.values()) for size, ended in sorted(of.items(), key=lambda item: float(item[0]))}
            for family, of in sorted(trials.items())
        },
        "trials_ended": {
            status: sum(ended.get(status, 0) for of in trials.values() for ended in of.values())
            for status in sorted({status for of in trials.values() for ended in of.values() for status in ended})
        },
    }


def cost_of(runs: Sequence[StoredRun]) -> dict[str, Any]:
    """What runs cost: tokens and hours of training steps that they took themselves, and hours in which any of them ran.

    A run that starts at a branch point has the time of its whole trunk; only its share after the branch point counts. An hour
    of a worker is one in which it took training steps. `hours` is the length of the union of all times from start to end.
    """
    tokens, seconds = 0, 0.0
    for run in runs:
        if run.record and run.record.steps:
            own = (run.record.steps - run.record.fork_step) / run.record.steps
            tokens += round(own * run.record.tokens)
            seconds += own * run.record.training_seconds * int(run.n_workers or 1)
    spans = sorted((run.started_ms, run.ended_ms) for run in runs if run.started_ms and run.ended_ms)
    covered, until = 0, 0
    for start, end in spans:
        covered += max(0, end - max(start, until))
        until = max(until, end)
    ended = sum(1 for run in runs if run.record is not None)
    hours = covered / HOUR_MS
    in_steps = seconds / 3600
    parallel = in_steps / hours if hours else None
    return {"runs": ended, "tokens": tokens, "worker_hours_in_steps": in_steps, "hours": hours, "workers_in_steps": parallel}
