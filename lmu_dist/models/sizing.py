"""Finds the widths of a family for a target number of non-embedding parameters N. Called by planning/grid."""

from collections.abc import Callable
from typing import Any

from lmu_dist.models import norms, registry
from lmu_dist.models.family import Family
from lmu_dist.models.shape import Shape

TOLERANCE = 0.02  # largest relative deviation from N; the built-in families meet it for N from 1e3 to 1e9
GOOD_ENOUGH = 0.01  # relative deviation at which the search stops


def non_embedding_params(family: Family, shape: Shape) -> int:
    """N as in Kaplan et al. 2020: parameters of sublayers and norms, including biases; no embeddings."""
    n_norms = family.n_sublayers(shape) * family.residual + 1
    return n_norms * norms.n_params(family.norm, shape.d_model) + family.n_params(shape)


def shape_for(
    family: Family | str, n_params: int, *, vocab_tokens: int, sequence_tokens: int, n_blocks: int = 2, options: Any = None
) -> Shape:
    """Finds a Shape of a family whose non-embedding parameters are within 2 % of `n_params`.

    The search starts at the family's nominal d_model. There it fits the family's free widths, usually that of the feed-forward
    layers, to the target. If their steps are too coarse it tries other values of d_model, nearest first. `family` may be a
    name. `options` are the family's options; None stands for the defaults.

    Raises ValueError if no widths come within 2 %.
    """
    family = registry.find(family) if isinstance(family, str) else family
    options = family.Options() if options is None else options
    nominal = family.nominal_d_model(n_params, n_blocks, sequence_tokens, options)
    best: Shape | None = None

    def deviation(shape: Shape) -> float:
        """Relative deviation of the shape's N from the target."""
        return abs(non_embedding_params(family, shape) / n_params - 1)

    for d_model in _widths_around(nominal):
        widths = family.widths(d_model, sequence_tokens, options)
        if widths is None:
            continue
        shape = _fill(
            family, Shape(family.name, d_model, n_blocks, sequence_tokens, vocab_tokens, widths), n_params, options, deviation
        )
        if best is None or deviation(shape) < deviation(best):
            best = shape
        if deviation(best) <= GOOD_ENOUGH:
            break
    if best is None or deviation(best) > TOLERANCE:
        keys = [f"model.{key}" for key in vars(options) if key not in family.passive_options]
        raise ValueError(
            f"no {family.name} of {n_blocks} blocks has N = {n_params:,} non-embedding parameters within {TOLERANCE:.0%}; "
            f"change model.n_params, or use the defaults of {', '.join([*keys, 'model.n_blocks'])}"
        )
    return best


def _widths_around(nominal: float) -> list[int]:
    """Widths from the nominal one outwards, up to 30 % away and at least 3; then narrower ones down to half, for families of
    which only few widths are possible."""
    reach = max(3, round(0.3 * nominal))
    near = sorted(range(max(1, round(nominal) - reach), round(nominal) + reach + 1), key=lambda d: abs(d - nominal))
    return near + list(range(round(nominal) - reach - 1, max(0, round(nominal / 2) - 1), -1))


def _fill(family: Family, blank: Shape, n_params: int, options: Any, deviation: Callable[[Shape], float]) -> Shape:
    """Fits the free widths to N in their order. A width after the first is changed only if N is not close enough without it."""
    shape = blank
    for i, (name, least, most) in enumerate(family.free_widths(blank, options, n_params)):
        if i and deviation(shape) <= GOOD_ENOUGH:
            break
        shape = _nearest(family, shape, name, least, most, n_params, deviation)
    return shape


def _nearest(
    family: Family, shape: Shape, name: str, low: int, high: int, n_params: int, deviation: Callable[[Shape], float]
) -> Shape:
    """The shape whose N is nearest to the target, with one width from low to high. Binary search, because N grows with it."""
    while low < high:
        middle = (low + high) // 2
        if non_embedding_params(family, shape.with_widths(**{name: middle})) < n_params:
            low = middle + 1
        else:
            high = middle
    return min((shape.with_widths(**{name: k}) for k in (max(low - 1, 1), low)), key=deviation)
