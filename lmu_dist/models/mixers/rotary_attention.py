"""Causal self-attention with rotary positions and QK-norm, the mixer of the family llama: (B, T, D) in, (B, T, D) out.

Legend: B batch, T time, D width, H heads, E = D / H channels of a head, an even number. Built by families/llama and hybrid.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from lmu_dist.array_types import Float
from lmu_dist.models import norms
from lmu_dist.models.mixers.attention import KVCache, attend_to_cache
from lmu_dist.models.products import Linear, scaled_dot_product_attention


class RotaryAttention(nn.Module):
    """Qwen3's attention (arXiv 2505.09388) with as many key heads as query heads; no biases.

    RMSNorm over the channels of every head of q and k (QK-norm, arXiv 2302.05442), with one gain for all heads; then rotary
    positions (arXiv 2104.09864). Texts may be longer than the training sequences. `score_scale` is the factor of the scores;
    None: 1/sqrt(E).
    """

    def __init__(self, d_model: int, n_heads: int, rotary_base: int, score_scale: float | None = None) -> None:
        super().__init__()
        self.n_heads, self.rotary_base, self.score_scale = n_heads, rotary_base, score_scale
        self.qkv = Linear(d_model, 3 * d_model, bias=False)
        self.q_norm = norms.build("rms", d_model // n_heads)
        self.k_norm = norms.build("rms", d_model // n_heads)
        self.out = Linear(d_model, d_model, bias=False)

    def _heads(self, x: Float[Tensor, "B T D"], start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys at positions start, start + 1, .. and values, each (B, H, T, E)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        cos, sin = rotations(start, x.shape[1], q.shape[-1], self.rotary_base, x.dtype, x.device)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence."""
        y = scaled_dot_product_attention(*self._heads(x, 0), is_causal=True, scale=self.score_scale)
        return self.out(y.transpose(1, 2).flatten(2))

    def advance(self, x: Float[Tensor, "B T D"], state: KVCache | None) -> tuple[Float[Tensor, "B T D"], KVCache]:
        """Outputs of the next chunk, and the cache after it, which holds rotated keys."""
        y, state = attend_to_cache(*self._heads(x, state.length if state else 0), state, self.score_scale)
        return self.out(y.transpose(1, 2).flatten(2)), state


def rotate(x: Float[Tensor, "B T H E"], cos: Float[Tensor, "T 1 F"], sin: Float[Tensor, "T 1 F"]) -> Float[Tensor, "B T H E"]:
    """Turns channels i and i + F together by the angle of the position; F = E/2. Llama's published code pairs them so."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # training uses cached tensors too, and autograd refuses tensors made in inference mode
def rotations(
    start: int, length: int, width: int, base: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "T 1 F"], Float[Tensor, "T 1 F"]]:
    """cos and sin of position * base^(-2i/E) for i < F = E/2 and E = `width`. Computed in float64 and cast last."""
    frequencies = float(base) ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.arange(start, start + length, dtype=torch.float64, device=device)[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def n_params(d_model: int, n_heads: int) -> int:
    """Number of trainable parameters."""
    return 4 * d_model**2 + 2 * (d_model // n_heads)


def saved_elements(d_model: int, n_heads: int, on_gpu: bool) -> tuple[int, int]:
    """Elements per token that autograd saves: (in the model's precision, in float32 always).

    x, the joint projection (inputs of QK-norm, and v), rotated q and k, the output, and the log-sum-exp of each head. The
    scores are computed again.
    """
    _, of_norm = norms.saved_elements("rms", d_model // n_heads, on_gpu)
    copies = 0 if on_gpu else 2 * d_model  # of q and k in float32, which are the joint projection itself if that is float32
    return 7 * d_model + n_heads, 2 * n_heads * of_norm - copies
