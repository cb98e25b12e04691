"""From a size to widths: (family, target non-embedding N) in, Shape out. The one dial of the ladder.

Called by planning/grid, for one run or for many; builds no model.
"""

from collections.abc import Callable
from dataclasses import replace

from lmu_dist.models.accounting import parameters
from lmu_dist.models.shape import FAMILIES, LAYOUTS, Shape

TOLERANCE = 0.02  # of N; promised for N from 1e3 to 1e9
AIM = 0.01  # a width other than sqrt(N/24) is tried only when this is missed
PAPER_REDUCED_ORDER_PER_WIDTH = 25 / 204  # the paper's largest model: q' = 25 at d = 204
PAPER_ORDERS_PER_ROW = 10  # q = 250 at q' = 25
HEAD_WIDTHS = (12, 64)  # of models narrower than 512; wider ones 64 to 128


def shape_for(
    family: str,
    n_params: int,
    *,
    vocab_tokens: int,
    sequence_tokens: int,
    n_blocks: int = 2,
    order: int | None = None,
    reduced_order: int | None = None,
    theta_tokens: int | None = None,
) -> Shape:
    """The Shape of `family` whose non-embedding parameters are within 2 % of `n_params`.

    d_model = sqrt(N / (12 n_blocks)), which is the paper's sqrt(N/24) for its two blocks, rounded to a multiple of the
    heads; the width of the feed-forward (LSTM: hidden) layers takes up the rest. Where one step of that width is too
    coarse, the memory order is moved by up to a third, then d_model. q' = 25/204 d and q = 10 q' as in the paper's
    largest model, q at most theta: a window of theta tokens has no more than theta coefficients. Given q, q' and theta
    are kept as they are.

    Raises ValueError when no widths come within 2 %.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; take one of {', '.join(FAMILIES)}")
    theta = theta_tokens or sequence_tokens
    nominal = (n_params / (12 * n_blocks)) ** 0.5
    best: Shape | None = None
    for d_model in _widths_around(nominal):
        n_heads = _heads(d_model) if "attention" in LAYOUTS[family] else 0
        if n_heads is None:
            continue
        rows = reduced_order or max(1, min(round(d_model * PAPER_REDUCED_ORDER_PER_WIDTH), theta // PAPER_ORDERS_PER_ROW))
        blank = Shape(family, d_model, n_blocks, sequence_tokens, vocab_tokens, n_heads=n_heads)
        if "lmu" in blank.sublayers:
            blank = replace(
                blank, order=order or min(PAPER_ORDERS_PER_ROW * rows, theta), reduced_order=rows, theta_tokens=theta
            )
        shape = _fill(blank, n_params, order_is_free=order is None)
        if best is None or _miss(shape, n_params) < _miss(best, n_params):
            best = shape
        if _miss(best, n_params) <= AIM:
            break
    if best is None or _miss(best, n_params) > TOLERANCE:
        raise ValueError(
            f"no {family} of {n_blocks} blocks has N = {n_params:,} non-embedding parameters within {TOLERANCE:.0%}; "
            "change model.n_params, or leave model.order, model.reduced_order and model.n_blocks to the rule"
        )
    return best


def _widths_around(nominal: float) -> list[int]:
    """Widths from the nominal one outwards, to 30 % away and at least 3."""
    reach = max(3, round(0.3 * nominal))
    return sorted(range(max(1, round(nominal) - reach), round(nominal) + reach + 1), key=lambda d: abs(d - nominal))


def _heads(d_model: int) -> int | None:
    """Largest power of two that divides d_model into heads of a common width; None where none does."""
    narrowest, widest = HEAD_WIDTHS if d_model < 512 else (64, 128)
    n_heads = 1
    while d_model % (2 * n_heads) == 0 and d_model // (2 * n_heads) >= narrowest:
        n_heads *= 2
    return n_heads if d_model // n_heads <= widest else None


def _miss(shape: Shape, n_params: int) -> float:
    return abs(parameters(shape).non_embedding / n_params - 1)


def _fill(blank: Shape, n_params: int, order_is_free: bool) -> Shape:
    """Spends what is left of N on the inner width, then on the order if the width's step was too coarse."""
    inner = "d_hidden" if "lstm" in blank.sublayers else "d_ff"
    shape = _nearest(lambda k: replace(blank, **{inner: k}), 1, 4 * n_params, n_params)
    if order_is_free and shape.order and _miss(shape, n_params) > AIM:
        low, high = max(1, shape.order - shape.order // 3), min(shape.order + shape.order // 3, shape.theta_tokens)
        tuned = shape
        shape = _nearest(lambda k: replace(tuned, order=k), low, max(low, high), n_params)
    return shape


def _nearest(make: Callable[[int], Shape], low: int, high: int, n_params: int) -> Shape:
    """The Shape make(k), low <= k <= high, whose N is nearest; N grows with k."""
    while low < high:
        middle = (low + high) // 2
        if parameters(make(middle)).non_embedding < n_params:
            low = middle + 1
        else:
            high = middle
    return min((make(k) for k in (max(low - 1, 1), low)), key=lambda s: _miss(s, n_params))
