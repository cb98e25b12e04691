"""The transformer of today: RMSNorm, rotary positions, QK-norm, SwiGLU, no biases, as Qwen3 (arXiv 2505.09388) at small size.

The block is that of models/modern_family; this family adds attention. Legend: D width, H heads, n sequence length.
"""

from pydantic.dataclasses import dataclass
from torch import nn

from lmu_dist.config.types import STRICT, Count
from lmu_dist.models.families.transformer import attention_executed_flops, attention_flops, choose_n_heads
from lmu_dist.models.mixers import rotary_attention
from lmu_dist.models.mixers.rotary_attention import RotaryAttention
from lmu_dist.models.modern_family import ModernFamily
from lmu_dist.models.shape import Shape
from lmu_dist.models.width_transfer import score_scale


@dataclass(frozen=True, config=STRICT)
class LlamaOptions:
    """Keys of llama under `model`."""

    rotary_base: Count = (
        10_000  # base of the rotary positions: pair i of the E/2 of a head turns by base^(-2i/E) radians per token
    )


class Llama(ModernFamily):
    """Attention with rotary positions and QK-norm in the modern block."""

    name = "llama"
    version = 1
    title = "Llama"
    report_rank = 4
    colour, colour_dark, marker, line = "#c61644", "#ee6577", "v", "-"
    Options = LlamaOptions
    rates_transfer = True

    def mixer(self, shape: Shape, options: LlamaOptions) -> nn.Module:
        """Builds attention."""
        return RotaryAttention(shape.d_model, shape.n_heads, shape.rotary_base, score_scale(shape))

    def mixer_widths(self, d_model: int, sequence_tokens: int, options: LlamaOptions) -> dict[str, int] | None:
        """The number of heads, as in the transformer, but halved until the width of a head is even."""
        n_heads = choose_n_heads(d_model)
        if n_heads is None or d_model % 2:
            return None
        while d_model // n_heads % 2:
            n_heads //= 2
        return {"n_heads": n_heads, "rotary_base": options.rotary_base}

    def mixer_params(self, shape: Shape) -> int:
        """Projections, and the gains of QK-norm."""
        return rotary_attention.n_params(shape.d_model, shape.n_heads)

    def mixer_largest_tensor(self, shape: Shape) -> int:
        """The joint projection to Q, K, V."""
        return 3 * shape.d_model**2

    def mixer_matmul_flops(self, shape: Shape) -> float:
        """Those of the transformer's attention."""
        return attention_flops(shape)

    def mixer_executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of the transformer's causal attention."""
        return attention_executed_flops(shape)

    def mixer_saved_elements(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """No scores are saved: the backward kernels compute them again."""
        return rotary_attention.saved_elements(shape.d_model, shape.n_heads, on_gpu)
