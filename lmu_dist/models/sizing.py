"""From a size to widths: (family, target non-embedding N) in, Shape out. The one dial of the ladder.

Called by planning/grid, for one run or for many; builds no model.
"""

from collections.abc import Callable
from typing import Any

from lmu_dist.models import registry
from lmu_dist.models.family import Family
from lmu_dist.models.shape import Shape

TOLERANCE = 0.02  # of N; promised for N from 1e3 to 1e9
AIM = 0.01  # another width than the nominal one is tried only when this is missed


def non_embedding_params(family: Family, shape: Shape) -> int:
    """N as in Kaplan et al. 2020: sublayers and norms, biases included; no token or position embeddings."""
    n_norms = family.n_sublayers(shape) * family.residual + 1
    return 2 * shape.d_model * n_norms + family.n_params(shape)


def shape_for(
    family: Family | str, n_params: int, *, vocab_tokens: int, sequence_tokens: int, n_blocks: int = 2, options: Any = None
) -> Shape:
    """The Shape of a family whose non-embedding parameters are within 2 % of `n_params`.

    d_model starts at the family's nominal width. The family's free widths (that of the feed-forward layers first) take up what
    is left of N; where their steps are too coarse another d_model is tried, nearest first. `family` may be a name; `options`
    are the family's, None for the defaults.

    Raises ValueError when no widths come within 2 %.
    """
    family = registry.find(family) if isinstance(family, str) else family
    options = family.Options() if options is None else options
    nominal = family.nominal_d_model(n_params, n_blocks, sequence_tokens, options)
    best: Shape | None = None

    def miss(shape: Shape) -> float:
        return abs(non_embedding_params(family, shape) / n_params - 1)

    for d_model in _widths_around(nominal):
        widths = family.widths(d_model, sequence_tokens, options)
        if widths is None:
            continue
        shape = _fill(
            family, Shape(family.name, d_model, n_blocks, sequence_tokens, vocab_tokens, widths), n_params, options, miss
        )
        if best is None or miss(shape) < miss(best):
            best = shape
        if miss(best) <= AIM:
            break
    if best is None or miss(best) > TOLERANCE:
        keys = [f"model.{key}" for key in vars(options) if key not in family.passive_options]
        raise ValueError(
            f"no {family.name} of {n_blocks} blocks has N = {n_params:,} non-embedding parameters within {TOLERANCE:.0%}; "
            f"change model.n_params, or leave {', '.join([*keys, 'model.n_blocks'])} to the rule"
        )
    return best


def _widths_around(nominal: float) -> list[int]:
    """Widths from the nominal one outwards, to 30 % away and at least 3."""
    reach = max(3, round(0.3 * nominal))
    return sorted(range(max(1, round(nominal) - reach), round(nominal) + reach + 1), key=lambda d: abs(d - nominal))


def _fill(family: Family, blank: Shape, n_params: int, options: Any, miss: Callable[[Shape], float]) -> Shape:
    """Spends what is left of N on the free widths, the next one only if the step of the one before was too coarse."""
    shape = blank
    for i, (name, least, most) in enumerate(family.free_widths(blank, options, n_params)):
        if i and miss(shape) <= AIM:
            break
        shape = _nearest(family, shape, name, least, most, n_params, miss)
    return shape


def _nearest(
    family: Family, shape: Shape, name: str, low: int, high: int, n_params: int, miss: Callable[[Shape], float]
) -> Shape:
    """The shape with the value low .. high of one width whose N is nearest; N grows with the width."""
    while low < high:
        middle = (low + high) // 2
        if non_embedding_params(family, shape.with_widths(**{name: middle})) < n_params:
            low = middle + 1
        else:
            high = middle
    return min((shape.with_widths(**{name: k}) for k in (max(low - 1, 1), low)), key=miss)
