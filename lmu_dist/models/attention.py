"""Causal multi-head self-attention, the transformer's mixer: (B, T, D) in, (B, T, D) out.

Legend: B batch, T time, D width, H heads. Built by lm.
"""

from jaxtyping import Float
from torch import Tensor, cat, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """GPT-2's attention sublayer: joint projection to Q, K, V, scaled dot product, output projection; all with biases."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def _heads(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))  # pyright: ignore[reportReturnType]

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """A whole sequence from its start."""
        q, k, v = self._heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def advance(
        self, x: Float[Tensor, "B T D"], state: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor]]:
        """The next chunk: attends to the keys and values (B, H, T', D/H) of all before it, which the state holds."""
        q, k, v = self._heads(x)
        if state is not None:
            k, v = cat([state[0], k], dim=2), cat([state[1], v], dim=2)
        seen, new = k.shape[2], q.shape[2]
        mask = q.new_ones(new, seen).tril(diagonal=seen - new).bool()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)
