"""A user's family in one file: linear attention with a forget gate per head (a simple form of Yang et al. 2023).

Run it with `lmu-dist ladder examples/own_family.yaml`. docs/families.md explains it.
Legend: B batch, T time, D width, H heads, E = D/H.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.models.family import Family
from lmu_dist.models.shape import Shape

N_HEADS = 2


class Mixer(nn.Module):
    """y_t = q_t S_t with a matrix S_t = g_t S_(t-1) + k_t^T v_t per head, 0 < g_t < 1, computed for all tokens at once."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.forget = nn.Linear(d_model, N_HEADS)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Complete sequences, (B, T, D) to (B, T, D)."""
        return self.advance(x, None)[0]

    def advance(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Next chunk of a text, and the state (B, H, E, E) after it. The cost per token does not grow with the text."""
        q, k, v = (t.unflatten(-1, (N_HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))  # (B, H, T, E)
        log_decay = F.logsigmoid(self.forget(x).transpose(1, 2) + 4).cumsum(-1)  # (B, H, T), summed from the start of the chunk
        causal = torch.ones(x.shape[1], x.shape[1], device=x.device).tril().bool()
        decay = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()  # (B, H, T, T)
        y = (q @ k.transpose(-1, -2) * decay) @ v
        after = (k * decay[..., -1, :, None]).transpose(-1, -2) @ v
        if state is not None:
            y = y + (q * log_decay[..., None].exp()) @ state
            after = after + state * log_decay[..., -1, None, None].exp()
        y = F.rms_norm(y, y.shape[-1:]).transpose(1, 2).flatten(2)
        return self.out(y), after


class GatedLinearAttention(Family):
    """Only `mixer` must be defined. Blocks, widths, counts and the colours of reports have defaults."""

    title = "gated linear attention"
    d_model_multiple = N_HEADS

    def mixer(self, shape: Shape, options: Any) -> nn.Module:
        """Builds the mixer."""
        return Mixer(shape.d_model)
