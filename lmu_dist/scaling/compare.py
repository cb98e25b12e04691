"""A new family against a base at every size both have run: a study and its laws in, factors and their change with size out."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling.collect import Study, title
from lmu_dist.scaling.efficiency import Curve, Factor, SeedNoise, curve, from_curves, from_laws
from lmu_dist.scaling.examine import Examination
from lmu_dist.scaling.intervals import Interval, around
from lmu_dist.scaling.laws import Chinchilla, Floats

Growth = tuple[float, Interval, str, tuple[int, int]]  # factor per decade of N, its interval, of what, from and to which N


@dataclass(frozen=True)
class AtSize:
    """The factor at one size: between the curves seen there, and between the laws of all sizes."""

    n_params: int
    curves: Factor
    laws: Factor


@dataclass(frozen=True)
class Comparison:
    """A new family against a base, at every size both have. `growth`: by what tenfold N multiplies the factor.

    It is that of `growth_from`, `laws` if these have a factor at two sizes or more, else `curves`.
    """

    base: str
    new: str
    sizes: tuple[AtSize, ...]
    growth: float | None
    growth_interval: Interval | None
    growth_from: str
    growth_sizes: tuple[int, int]
    remark: str


def at_size(study: Study, family: str, rung: int) -> Curve:
    """Loss against tokens of a family at a size."""
    runs = study.of(family, rung)
    return curve([r.record.tokens for r in runs], [r.record.val_loss_nats for r in runs])


def compare(study: Study, laws: Mapping[str, Examination], base: str, new: str, noise: SeedNoise | None) -> Comparison:
    """All factors of one pair of families."""
    sizes = list[AtSize]()
    for rung in (n for n in study.rungs if study.of(base, n) and study.of(new, n)):
        seeds = (_fewest_seeds(study, base, rung), _fewest_seeds(study, new, rung))
        curves = from_curves(at_size(study, base, rung), at_size(study, new, rung), noise, seeds)
        sizes.append(AtSize(rung, curves, _between_laws(study, laws, base, new, rung)))
    found = _growth_of_laws(laws[base], laws[new], sizes) or _growth_of_curves(sizes)
    if found is None:
        why = "fewer than two sizes have a factor with an interval"
        return Comparison(base, new, tuple(sizes), None, None, "", (0, 0), why)
    return Comparison(base, new, tuple(sizes), *found, "")


def _fewest_seeds(study: Study, family: str, rung: int) -> int:
    """Of any budget: the point of a curve that is known worst counts."""
    return min(Counter(run.record.planned_tokens for run in study.of(family, rung)).values())


def _growth_of_laws(base: Examination, new: Examination, sizes: list[AtSize]) -> Growth | None:
    known = [(size.n_params, size.laws.value, size.laws.losses) for size in sizes if size.laws.value and size.laws.losses]
    if len(known) < 2:
        return None
    slope = _slope([n for n, _, _ in known])
    growth = float(np.exp(slope @ np.log([value for _, value, _ in known])))
    pairs = _pairs(base, new)
    drawn = np.array([_factors(pairs, float(np.sqrt(np.prod(losses))), n) for n, _, losses in known])
    interval = around(growth, np.exp(slope @ np.log(drawn)), max(base.widen, new.widen))
    return (growth, interval, "laws", (known[0][0], known[-1][0])) if interval else None


def _growth_of_curves(sizes: list[AtSize]) -> Growth | None:
    """Their factors are of other runs at every size, so their errors are independent."""
    known = [
        (size.n_params, size.curves.value, size.curves.interval) for size in sizes if size.curves.value and size.curves.interval
    ]
    if len(known) < 2:
        return None
    slope = _slope([n for n, _, _ in known])
    growth = float(slope @ np.log([value for _, value, _ in known]))
    reach = float(np.linalg.norm(slope * [np.log(high / low) / 2 for _, _, (low, high) in known]))
    interval = float(np.exp(growth - reach)), float(np.exp(growth + reach))
    return float(np.exp(growth)), interval, "curves", (known[0][0], known[-1][0])


def _between_laws(study: Study, laws: Mapping[str, Examination], base: str, new: str, rung: int) -> Factor:
    b, w = laws[base].law, laws[new].law
    if not (isinstance(b, Chinchilla) and isinstance(w, Chinchilla)):
        lacking = base if laws[base].law is None else new
        return Factor(None, None, None, None, None, f"the law of the {title(lacking)} is not determined")
    tokens = [[run.record.tokens for run in study.of(family, rung)] for family in (base, new)]
    seen = [(float(min(d)), float(max(d))) for d in tokens]
    return from_laws(b, w, rung, (seen[0], seen[1]), _pairs(laws[base], laws[new]), max(laws[base].widen, laws[new].widen))


def _pairs(base: Examination, new: Examination) -> list[tuple[Chinchilla, Chinchilla]]:
    """Laws of the same draw of runs; as many as both have, which is fewer for a longer table."""
    both = zip(base.laws, new.laws, strict=False)
    return [(b, w) for b, w in both if isinstance(b, Chinchilla) and isinstance(w, Chinchilla)]


def _factors(pairs: list[tuple[Chinchilla, Chinchilla]], loss: float, n_params: int) -> Floats:
    return np.array([float(b.tokens_for(loss, n_params) / w.tokens_for(loss, n_params)) for b, w in pairs])


def _slope(n_params: list[int]) -> Floats:
    """Weights that make of values at these sizes their least-squares slope per decade of N."""
    x = np.log10(np.array(n_params, np.float64))
    centred = x - x.mean()
    return centred / (centred @ centred)
