"""The transformer baseline: GPT-2's pre-norm block as in Kaplan et al. 2020, and the cost of attention.

Legend: D width, H heads, n sequence length.
"""

from typing import Any

from torch import nn

from lmu_dist.models.counting import bytes_of
from lmu_dist.models.family import Family, paper_d_model
from lmu_dist.models.mixers import feed_forward
from lmu_dist.models.mixers.attention import Attention
from lmu_dist.models.recipe import KAPLAN
from lmu_dist.models.shape import Shape
from lmu_dist.models.width_transfer import score_scale

HEAD_WIDTHS = (12, 64)  # smallest and largest width of a head, for d_model < 512
WIDE_HEAD_WIDTHS = (64, 128)  # for d_model >= 512


class Transformer(Family):
    """Learned position embedding, and blocks of causal self-attention and a feed-forward layer."""

    name = "transformer"
    version = 1
    title = "transformer"
    report_rank = 2
    colour, colour_dark, marker, line = "#c24f00", "#f2914f", "^", "--"
    recipe = KAPLAN
    learned_positions = True
    rates_transfer = True

    def mixer(self, shape: Shape, options: Any) -> nn.Module:
        """Builds attention."""
        return Attention(shape.d_model, shape.n_heads, score_scale(shape))

    def widths(self, d_model: int, sequence_tokens: int, options: Any) -> dict[str, int] | None:
        """The number of heads. The feed-forward width is a free width."""
        n_heads = choose_n_heads(d_model)
        return None if n_heads is None else {"d_ff": 1, "n_heads": n_heads}

    def nominal_d_model(self, n_params: int, n_blocks: int, sequence_tokens: int, options: Any) -> float:
        """sqrt(N / (12 n_blocks)), as in the LMU paper."""
        return paper_d_model(n_params, n_blocks)

    def n_sublayers(self, shape: Shape) -> int:
        """Two per block."""
        return 2 * shape.n_blocks

    def n_params(self, shape: Shape) -> int:
        """Attention and feed-forward layer per block."""
        return shape.n_blocks * (attention_params(shape) + feed_forward.n_params(shape.d_model, shape.d_ff))

    def largest_tensor(self, shape: Shape) -> int:
        """The joint projection to Q, K, V or a feed-forward matrix."""
        return max(3 * shape.d_model**2, shape.d_model * shape.d_ff)

    def matmul_flops(self, shape: Shape) -> float:
        """Attention and feed-forward layer per block."""
        return shape.n_blocks * (attention_flops(shape) + feed_forward.matmul_flops(shape.d_model, shape.d_ff))

    def executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of causal attention, and of the feed-forward layer, per block."""
        (forward, backward), others = attention_executed_flops(shape), feed_forward.matmul_flops(shape.d_model, shape.d_ff)
        return shape.n_blocks * (forward + others), shape.n_blocks * (backward + 2 * others)

    def activation_bytes(self, shape: Shape, n_rows: int, precision: str, on_gpu: bool) -> float:
        """Attention saves no scores: the backward kernels recompute them."""
        saved = shape.n_blocks * (attention_saved_elements(shape) + feed_forward.saved_elements(shape.d_model, shape.d_ff))
        return n_rows * shape.sequence_tokens * saved * bytes_of(precision)


def choose_n_heads(d_model: int) -> int | None:
    """Largest power of two that gives heads of at least the smallest width. None if these are wider than the largest width."""
    narrowest, widest = HEAD_WIDTHS if d_model < 512 else WIDE_HEAD_WIDTHS
    n_heads = 1
    while d_model % (2 * n_heads) == 0 and d_model // (2 * n_heads) >= narrowest:
        n_heads *= 2
    return n_heads if d_model // n_heads <= widest else None


def attention_params(shape: Shape) -> int:
    """Trainable parameters of one attention sublayer."""
    return 4 * shape.d_model**2 + 4 * shape.d_model


def attention_flops(shape: Shape) -> int:
    """Forward FLOPs per token of one attention sublayer. Causal attention is counted at its full length n."""
    return 8 * shape.d_model**2 + 4 * shape.sequence_tokens * shape.d_model


def attention_executed_flops(shape: Shape) -> tuple[float, float]:
    """FLOPs per token that one attention sublayer executes: forward, and backward.

    Flash attention, which torch takes on GPUs and CPUs, skips the blocks above the diagonal. That is assumed to be half of
    every n x n product: two in the forward pass and five in the backward pass, which computes the scores again.
    """
    product, linear = shape.sequence_tokens * shape.d_model, 8 * shape.d_model**2
    return linear + 2 * product, 2 * linear + 5 * product


def attention_saved_elements(shape: Shape) -> int:
    """Elements per token that one attention sublayer saves for the backward pass."""
    return 5 * shape.d_model + shape.n_heads
