"""The transformer baseline: GPT-2's pre-norm block as in Kaplan et al. 2020, and what its attention costs.

Legend: D width, H heads, n sequence length.
"""

from typing import Any

from torch import nn

from lmu_dist.models.counting import bytes_of
from lmu_dist.models.family import Family, paper_d_model
from lmu_dist.models.mixers import feed_forward
from lmu_dist.models.mixers.attention import Attention
from lmu_dist.models.shape import Shape

HEAD_WIDTHS = (12, 64)  # of models narrower than 512; wider ones 64 to 128


class Transformer(Family):
    """Learned positions; blocks of causal self-attention and a feed-forward layer."""

    name = "transformer"
    version = 1
    title = "transformer"
    report_rank = 2
    colour, colour_dark, marker, line = "#c24f00", "#f2914f", "^", "--"
    learned_positions = True

    def mixer(self, shape: Shape, options: Any) -> nn.Module:
        """Attention."""
        return Attention(shape.d_model, shape.n_heads)

    def widths(self, d_model: int, sequence_tokens: int, options: Any) -> dict[str, int] | None:
        """Heads of a common width; the feed-forward width is free."""
        n_heads = choose_n_heads(d_model)
        return None if n_heads is None else {"d_ff": 1, "n_heads": n_heads}

    def nominal_d_model(self, n_params: int, n_blocks: int, sequence_tokens: int, options: Any) -> float:
        """The paper's rule."""
        return paper_d_model(n_params, n_blocks)

    def n_sublayers(self, shape: Shape) -> int:
        """Two in each block."""
        return 2 * shape.n_blocks

    def n_params(self, shape: Shape) -> int:
        """Attention and feed-forward."""
        return shape.n_blocks * (attention_params(shape) + feed_forward.n_params(shape.d_model, shape.d_ff))

    def largest_tensor(self, shape: Shape) -> int:
        """The joint projection to Q, K, V, or a feed-forward matrix."""
        return max(3 * shape.d_model**2, shape.d_model * shape.d_ff)

    def matmul_flops(self, shape: Shape) -> float:
        """Attention and feed-forward."""
        return shape.n_blocks * (attention_flops(shape) + feed_forward.matmul_flops(shape.d_model, shape.d_ff))

    def activation_bytes(self, shape: Shape, n_rows: int, precision: str, on_gpu: bool) -> float:
        """Attention keeps no scores: its kernels compute them again."""
        kept = shape.n_blocks * (attention_saved_elements(shape) + feed_forward.saved_elements(shape.d_model, shape.d_ff))
        return n_rows * shape.sequence_tokens * kept * bytes_of(precision)


def choose_n_heads(d_model: int) -> int | None:
    """Largest power of two that divides d_model into heads of a common width; None where none does."""
    narrowest, widest = HEAD_WIDTHS if d_model < 512 else (64, 128)
    n_heads = 1
    while d_model % (2 * n_heads) == 0 and d_model // (2 * n_heads) >= narrowest:
        n_heads *= 2
    return n_heads if d_model // n_heads <= widest else None


def attention_params(shape: Shape) -> int:
    """Trained parameters of one attention sublayer."""
    return 4 * shape.d_model**2 + 4 * shape.d_model


def attention_flops(shape: Shape) -> int:
    """Forward FLOPs per token of one attention sublayer, causal attention at its full n."""
    return 8 * shape.d_model**2 + 4 * shape.sequence_tokens * shape.d_model


def attention_saved_elements(shape: Shape) -> int:
    """Numbers per token that one attention sublayer keeps for the backward pass."""
    return 5 * shape.d_model + shape.n_heads
