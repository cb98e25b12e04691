"""Compares a new family with a base family: a study and its laws in, data-efficiency factors and their trend with size out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling.appearance import title
from lmu_dist.scaling.collect import Study
from lmu_dist.scaling.curve_factor import factor_with_noise
from lmu_dist.scaling.efficiency import Curve, Factor, factor_from_laws, lower_envelope
from lmu_dist.scaling.intervals import Interval, bootstrap_interval
from lmu_dist.scaling.laws import Chinchilla, Floats
from lmu_dist.scaling.run_losses import losses_of
from lmu_dist.scaling.trunk_noise import TrunkNoise
from lmu_dist.scaling.validate import FitResult

Growth = tuple[float, Interval, str, tuple[int, int]]  # change per tenfold N, its interval, laws or curves, range of N


@dataclass(frozen=True)
class SizeComparison:
    """The factor at one size: from the measured curves at that size, and from the laws fitted to all sizes."""

    n_params: int
    curves: Factor
    laws: Factor


@dataclass(frozen=True)
class Comparison:
    """The factors of a new family against a base family at all common sizes.

    `growth` is the number by which tenfold N multiplies the factor. It is computed from `growth_from`: `laws` if they have a
    factor at two sizes or more, else `curves`.
    """

    base: str
    new: str
    sizes: tuple[SizeComparison, ...]
    growth: float | None
    growth_interval: Interval | None
    growth_from: str
    growth_sizes: tuple[int, int]
    remark: str


def loss_curve(study: Study, family: str, size_bin: int) -> Curve:
    """Returns loss against tokens of a family in one size bin."""
    runs = study.runs_of(family, size_bin)
    return lower_envelope([r.record.tokens for r in runs], [r.record.val_loss_nats for r in runs])


def compare(study: Study, laws: Mapping[str, FitResult], base: str, new: str, noise: TrunkNoise) -> Comparison:
    """Returns all factors of one pair of families."""
    sizes = list[SizeComparison]()
    for size_bin in (n for n in study.size_bins if study.runs_of(base, n) and study.runs_of(new, n)):
        losses = [losses_of(run.record for run in study.runs_of(family, size_bin)) for family in (base, new)]
        curves, _ = factor_with_noise(losses[0], losses[1], noise)
        sizes.append(SizeComparison(size_bin, curves, _factor_from_laws(study, laws, base, new, size_bin)))
    of_curves = [(size.n_params, size.curves) for size in sizes]
    growth = _growth_from_laws(laws[base], laws[new], sizes) or growth_of_factors(of_curves)
    if growth is None:
        remark = "fewer than two sizes have a factor with an interval"
        return Comparison(base, new, tuple(sizes), None, None, "", (0, 0), remark)
    return Comparison(base, new, tuple(sizes), *growth, "")


def _growth_from_laws(base: FitResult, new: FitResult, sizes: list[SizeComparison]) -> Growth | None:
    known = [(size.n_params, size.laws.value, size.laws.losses) for size in sizes if size.laws.value and size.laws.losses]
    if len(known) < 2:
        return None
    slope = _slope_weights([n for n, _, _ in known])
    growth = float(np.exp(slope @ np.log([value for _, value, _ in known])))
    pairs = _paired_resamples(base, new)
    resampled = np.array([_factors(pairs, float(np.sqrt(np.prod(losses))), n) for n, _, losses in known])
    interval = bootstrap_interval(growth, np.exp(slope @ np.log(resampled)), max(base.correction, new.correction))
    return (growth, interval, "laws", (known[0][0], known[-1][0])) if interval else None


def growth_of_factors(factors: Sequence[tuple[int, Factor]]) -> Growth | None:
    """Returns the growth of factors between curves, each with its size; None if fewer than two have an interval.

    Factors at different sizes come from different trunks, so their errors are independent. Their noise is estimated from the
    same trunks, so that the growth has no more degrees of freedom than they have.
    """
    known = [(n, factor.value, factor.interval) for n, factor in factors if factor.value and factor.interval]
    if len(known) < 2:
        return None
    slope = _slope_weights([n for n, _, _ in known])
    growth = float(slope @ np.log([value for _, value, _ in known]))
    reach = float(np.linalg.norm(slope * [np.log(high / low) / 2 for _, _, (low, high) in known]))
    interval = float(np.exp(growth - reach)), float(np.exp(growth + reach))
    return float(np.exp(growth)), interval, "curves", (known[0][0], known[-1][0])


def _factor_from_laws(study: Study, laws: Mapping[str, FitResult], base: str, new: str, size_bin: int) -> Factor:
    b, w = laws[base].law, laws[new].law
    if not (isinstance(b, Chinchilla) and isinstance(w, Chinchilla)):
        undetermined = base if laws[base].law is None else new
        return Factor(None, None, None, None, None, f"the law of the {title(undetermined)} is not determined")
    tokens = [[run.record.tokens for run in study.runs_of(family, size_bin)] for family in (base, new)]
    token_ranges = [(float(min(d)), float(max(d))) for d in tokens]
    return factor_from_laws(
        b,
        w,
        size_bin,
        (token_ranges[0], token_ranges[1]),
        _paired_resamples(laws[base], laws[new]),
        max(laws[base].correction, laws[new].correction),
    )


def _paired_resamples(base: FitResult, new: FitResult) -> list[tuple[Chinchilla, Chinchilla]]:
    """Returns pairs of laws from the same resample of runs; as many as both have (a longer table has fewer)."""
    both = zip(base.laws, new.laws, strict=False)
    return [(b, w) for b, w in both if isinstance(b, Chinchilla) and isinstance(w, Chinchilla)]


def _factors(pairs: list[tuple[Chinchilla, Chinchilla]], loss: float, n_params: int) -> Floats:
    return np.array([float(b.tokens_for(loss, n_params) / w.tokens_for(loss, n_params)) for b, w in pairs])


def _slope_weights(n_params: list[int]) -> Floats:
    """Returns the weights whose product with values at these sizes is the least-squares slope per decade of N."""
    x = np.log10(np.array(n_params, np.float64))
    centred = x - x.mean()
    return centred / (centred @ centred)
