"""Analyses a study: collected runs in, one `Results` with fits, factors and the answer out, for results.json and the page."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from lmu_dist.scaling import positions
from lmu_dist.scaling.answer import Answer, answer
from lmu_dist.scaling.band_table import BandRow, Group, band_rows
from lmu_dist.scaling.bands import Curves as PositionCurves
from lmu_dist.scaling.collect import Run, Study, resampling_groups, rows_from_runs
from lmu_dist.scaling.compare import Comparison, compare
from lmu_dist.scaling.compare_laws import LawComparison
from lmu_dist.scaling.compute import CountingConvention, fit_conventions
from lmu_dist.scaling.controlled import ControlledComparison, controlled_comparisons
from lmu_dist.scaling.effective_tokens import EffectiveTokens, effective_tokens
from lmu_dist.scaling.efficiency import Factor, Improvement, improvement_ratio
from lmu_dist.scaling.family_laws import compare_family_laws
from lmu_dist.scaling.forms import law_name
from lmu_dist.scaling.intervals import N_RESAMPLES, bootstrap_weights
from lmu_dist.scaling.laws import Chinchilla, Floats
from lmu_dist.scaling.pair import PAPER, Pair, choose_pair
from lmu_dist.scaling.positions import Plateau
from lmu_dist.scaling.run_losses import RunLoss, losses_of
from lmu_dist.scaling.sizes import SizeLaw, fit_power_law
from lmu_dist.scaling.trunk_noise import TrunkNoise
from lmu_dist.scaling.validate import FitResult, fit_and_validate

Curves = Mapping[str, Floats]  # run id: loss at positions 1 .. n
PAPER_ORDER = (PAPER.new, PAPER.base, "lstm")  # the families of the paper's second claim, the best first


@dataclass(frozen=True)
class FamilyFit:
    """The fitted law of a family, its compute-optimal allocation under the four counting conventions, and all laws compared.

    Factors are computed from `result`, Chinchilla's law, which has tokens for a given loss in closed form; `comparison` says
    which laws the runs support.
    """

    family: str
    result: FitResult
    conventions: tuple[CountingConvention, ...]
    run_ids: tuple[str, ...]
    comparison: LawComparison
    effective: EffectiveTokens | None  # of the most repeated data


@dataclass(frozen=True)
class PositionLoss:
    """Loss by position of a family and size at its largest budget, averaged over seeds."""

    family: str
    n_params: int
    tokens: int
    n_seeds: int
    losses: tuple[float, ...]
    level: Plateau


@dataclass(frozen=True)
class FactorByPosition:
    """The factor of the study's pair by position, at one size. It needs known seed noise, since bins are noisy."""

    n_params: int
    bins: tuple[tuple[int, int, Factor], ...]


@dataclass(frozen=True)
class Results:
    """Everything the report shows.

    `headline` is the comparison of `pair`, one of `comparisons`, which compare every family with the base of the pair.
    """

    pair: Pair
    headline: Comparison | None
    answer: Answer
    fits: tuple[FamilyFit, ...]
    comparisons: tuple[Comparison, ...]
    controlled: tuple[ControlledComparison, ...]
    improvement: Improvement
    noise: TrunkNoise
    in_size: tuple[SizeLaw, ...]
    positions: tuple[PositionLoss, ...]
    by_position: FactorByPosition | None
    bands: tuple[BandRow, ...]

    @property
    def other_laws(self) -> dict[str, list[str]]:
        """For families whose runs do not support the law that their factors are computed from: the laws they do support."""
        return _other_laws(self.fits)

    @property
    def all_comparisons(self) -> tuple[Comparison, ...]:
        """Those with the base of the pair, and the controlled ones that are not among them."""
        known = {(c.base, c.new) for c in self.comparisons}
        more = (c.comparison for c in self.controlled if c.comparison and (c.base, c.new) not in known)
        return (*self.comparisons, *more)


def default_pair(study: Study, baseline: str | None = None, family: str | None = None, planned: str | None = None) -> Pair:
    """Returns the pair whose factor is the headline; see `choose_pair`, also for the errors."""
    n_runs = {name: len(study.runs_of(name)) for name in study.families}
    return choose_pair(n_runs, baseline, family, planned, f"experiment {study.experiment!r} has finished, comparable runs of")


def runs_at_largest_budget(study: Study) -> list[Run]:
    """Returns the runs at the largest budget of every family and size; the report shows their loss by position."""
    largest = list[Run]()
    for family in study.families:
        for size_bin in study.size_bins:
            runs = study.runs_of(family, size_bin)
            most = max((run.budget_bin for run in runs), default=0)
            largest += [run for run in runs if run.budget_bin == most]
    return largest


def runs_compared_by_position(study: Study, pair: Pair) -> list[Run]:
    """Returns the runs of a pair at its largest common size; the factor by position is computed from them."""
    common = [n for n in study.size_bins if study.runs_of(pair.base, n) and study.runs_of(pair.new, n)]
    return [run for family in (pair.base, pair.new) for run in study.runs_of(family, common[-1])] if common else []


def analyse(study: Study, curves: Curves, n_resamples: int = N_RESAMPLES, pair: Pair | None = None) -> Results:
    """Computes all results from the runs of a study, and the losses by position of those runs that have them.

    `pair`: whose factor is the headline; by default as `default_pair` chooses.
    """
    pair = pair or default_pair(study)
    noise = TrunkNoise(losses_of(run.record for run in study.runs))
    fits = tuple(_fit(study, family, n_resamples) for family in study.families)
    laws = {f.family: f.result for f in fits}

    @cache
    def compared(base: str, new: str) -> Comparison:
        return compare(study, laws, base, new, noise)

    others = [name for name in study.families if name != pair.base and pair.base in study.families]
    headline = compared(pair.base, pair.new) if pair.new in others else None
    return Results(
        pair=pair,
        headline=headline,
        answer=answer(study, headline, noise, _other_laws(fits), pair),
        fits=fits,
        comparisons=tuple(compared(pair.base, new) for new in others),
        controlled=controlled_comparisons(study, compared),
        improvement=_improvement(study, n_resamples),
        noise=noise,
        in_size=tuple(_size_law(study, family) for family in study.families),
        positions=tuple(_positions(study, curves)),
        by_position=factor_by_position(study, curves, noise, pair) if noise.overall else None,
        bands=band_rows(curves_at_largest_budget(study, curves), pair),
    )


def _fit(study: Study, family: str, n_resamples: int) -> FamilyFit:
    runs = study.runs_of(family)
    names = [run.name or run.run_id for run in runs]
    result = fit_and_validate(Chinchilla, rows_from_runs(runs), resampling_groups(runs), n_resamples, names=names)
    conventions, comparison = tuple(fit_conventions(runs, result)), compare_family_laws(runs)
    effective = effective_tokens(comparison, n_resamples)
    return FamilyFit(family, result, conventions, tuple(run.run_id for run in runs), comparison, effective)


def _other_laws(fits: Sequence[FamilyFit]) -> dict[str, list[str]]:
    supported = {f.family: [law.name for law in f.comparison.supported] for f in fits if f.result.law and f.comparison.fits}
    return {family: names for family, names in supported.items() if law_name(Chinchilla) not in names}


def _improvement(study: Study, n_resamples: int) -> Improvement:
    losses = defaultdict[tuple[int, int, int], dict[str, Run]](dict)
    for run in study.runs:
        losses[run.size_bin, run.budget_bin, run.record.seed][run.record.family] = run
    common = [cell for cell in losses.values() if all(name in cell for name in PAPER_ORDER)]
    table = [[cell[name].record.val_loss_nats for name in PAPER_ORDER] for cell in common]
    weights = bootstrap_weights(resampling_groups([cell[PAPER.new] for cell in common]), n_resamples) if common else None
    return improvement_ratio(np.array(table), weights)


def _size_law(study: Study, family: str) -> SizeLaw:
    runs = [run for run in runs_at_largest_budget(study) if run.record.family == family]
    most = max(run.budget_bin for run in runs)
    losses = defaultdict[int, list[float]](list)
    for run in runs:
        if run.budget_bin == most:
            losses[run.record.n_params].append(np.log(run.record.val_loss_nats))
    sizes = sorted(losses)
    means = np.exp([np.mean(losses[n]) for n in sizes])
    return fit_power_law(family, most, np.array(sizes, np.float64), means)


def curves_at_largest_budget(study: Study, curves: Curves) -> dict[Group, PositionCurves]:
    """Returns the losses by position of the seeds of every family and size at its largest budget, as far as runs have them."""
    groups = defaultdict[Group, list[Run]](list)
    for run in runs_at_largest_budget(study):
        if run.run_id in curves:
            groups[Group(run.record.family, run.size_bin, len(curves[run.run_id]), run.budget_bin)].append(run)
    return {
        group: PositionCurves(
            np.array([curves[run.run_id] for run in runs]),
            np.array([run.record.val_loss_standard_error_nats for run in runs]),
        )
        for group, runs in groups.items()
    }


def _positions(study: Study, curves: Curves) -> list[PositionLoss]:
    position_losses = []
    for group, found in curves_at_largest_budget(study, curves).items():
        level = positions.find_plateau(positions.bin_positions(found.mean))
        losses = tuple(float(v) for v in found.mean)
        position_losses.append(PositionLoss(group.family, group.n_params, group.tokens, len(found.losses), losses, level))
    return position_losses


def factor_by_position(study: Study, curves: Curves, noise: TrunkNoise, pair: Pair) -> FactorByPosition | None:
    """Returns the factor of a pair by position at its largest common size; None if its runs have no losses by position."""
    tables: dict[str, list[tuple[RunLoss, Floats]]] = {pair.base: [], pair.new: []}
    runs = [run for run in runs_compared_by_position(study, pair) if run.run_id in curves]
    for run, loss in zip(runs, losses_of(run.record for run in runs), strict=True):
        tables[run.record.family].append((loss, curves[run.run_id]))
    base, new = tables[pair.base], tables[pair.new]
    if not base or not new:
        return None
    return FactorByPosition(runs[0].size_bin, tuple(positions.factors_by_position(base, new, noise)))
