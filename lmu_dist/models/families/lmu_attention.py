"""The LMU with global self-attention (arXiv 2110.02402, section 3): attention in place of the first feed-forward layer."""

from collections.abc import Iterator

from torch import nn

from lmu_dist.models.counting import bytes_of
from lmu_dist.models.families.lmu import (
    LMU,
    LMUOptions,
    mixer_executed_flops,
    mixer_matmul_flops,
    mixer_params,
    mixer_saved_elements,
)
from lmu_dist.models.families.transformer import (
    attention_executed_flops,
    attention_flops,
    attention_params,
    attention_saved_elements,
    choose_n_heads,
)
from lmu_dist.models.mixers import feed_forward
from lmu_dist.models.mixers.attention import Attention
from lmu_dist.models.mixers.feed_forward import FeedForward
from lmu_dist.models.shape import Shape
from lmu_dist.models.width_transfer import score_scale


class LMUAttention(LMU):
    """A block is attention, LMU, FFN. There is no position embedding, because the memory encodes the order of the tokens."""

    name = "lmu_attention"
    version = 1
    title = "LMU with attention"
    report_rank = 1
    colour, colour_dark, marker, line = "#00805d", "#3fce9f", "s", "-."
    rates_transfer = True

    def sublayers(self, shape: Shape, options: LMUOptions) -> Iterator[nn.Module]:
        """Builds attention, LMU, FFN for each block."""
        for _ in range(shape.n_blocks):
            yield Attention(shape.d_model, shape.n_heads, score_scale(shape))
            yield self.mixer(shape, options)
            yield FeedForward(shape.d_model, shape.d_ff)

    def widths(self, d_model: int, sequence_tokens: int, options: LMUOptions) -> dict[str, int] | None:
        """The widths of the LMU and the number of heads."""
        widths, n_heads = super().widths(d_model, sequence_tokens, options), choose_n_heads(d_model)
        return None if widths is None or n_heads is None else widths | {"n_heads": n_heads}

    def n_params(self, shape: Shape) -> int:
        """Attention, LMU and feed-forward per block."""
        per_block = attention_params(shape) + mixer_params(shape) + feed_forward.n_params(shape.d_model, shape.d_ff)
        return shape.n_blocks * per_block

    def largest_tensor(self, shape: Shape) -> int:
        """The largest tensor of the LMU, or the joint projection of attention to Q, K, V."""
        return max(super().largest_tensor(shape), 3 * shape.d_model**2)

    def matmul_flops(self, shape: Shape) -> float:
        """Attention, LMU and feed-forward per block."""
        per_block = attention_flops(shape) + mixer_matmul_flops(shape) + feed_forward.matmul_flops(shape.d_model, shape.d_ff)
        return shape.n_blocks * per_block

    def executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of causal attention, the fused form of the LMU and the feed-forward layer per block."""
        mixer, attention = mixer_executed_flops(shape, n_rows, on_gpu), attention_executed_flops(shape)
        others = feed_forward.matmul_flops(shape.d_model, shape.d_ff)
        return shape.n_blocks * (mixer[0] + attention[0] + others), shape.n_blocks * (mixer[1] + attention[1] + 2 * others)

    def activation_bytes(self, shape: Shape, n_rows: int, precision: str, on_gpu: bool) -> float:
        """Bytes that attention, the fused LMU and feed-forward save."""
        per_token, float32_per_token = mixer_saved_elements(shape, n_rows, on_gpu)
        per_token += attention_saved_elements(shape) + feed_forward.saved_elements(shape.d_model, shape.d_ff)
        return n_rows * shape.sequence_tokens * shape.n_blocks * (per_token * bytes_of(precision) + 4 * float32_per_token)
