"""Causal multi-head self-attention, the transformer's mixer: (B, T, D) in, (B, T, D) out.

Legend: B batch, T time, D width, H heads. Built by lm.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Cache:
    """Keys and values (B, H, room, D/H) of the `length` tokens before. It grows in place: who goes on from it uses it up."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def extend(self, keys: Float[Tensor, "B H T E"], values: Float[Tensor, "B H T E"]) -> tuple[Tensor, Tensor]:
        """All keys and values, these included. Room doubles when used up, so that a token costs no copy of those before."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            more = (0, 0, 0, max(end, 2 * self.length) - self.keys.shape[2])
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


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

    def advance(self, x: Float[Tensor, "B T D"], state: Cache | None) -> tuple[Float[Tensor, "B T D"], Cache]:
        """The next chunk: attends to the keys and values of all before it, which the state holds."""
        q, k, v = self._heads(x)
        state = state or Cache(k[:, :, :0], v[:, :, :0])
        k, v = state.extend(k, v)
        seen, new = k.shape[2], q.shape[2]
        # One new token sees all that is there.
        mask = None if new == 1 else q.new_ones(new, seen).tril(diagonal=seen - new).bool()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), state
