"""Causal multi-head self-attention, the mixer of the transformer: (B, T, D) in, (B, T, D) out.

`KVCache` and `attend_to_cache` are also used by rotary_attention.
Legend: B batch, T time, D width, H heads, E = D / H channels of a head. Built by the families.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models.products import Linear, scaled_dot_product_attention


@dataclass
class KVBuffer:
    """Keys and values (B, H, capacity, E), of which the first `n_filled` tokens are in use by some cache."""

    keys: Tensor
    values: Tensor
    n_filled: int = 0


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the `length` tokens so far. It never changes, so several texts may go on from one cache.

    Caches of one text share a buffer. The one that has all of its filled tokens may append to it without a copy.
    """

    buffer: KVBuffer
    length: int = 0

    def extend(
        self, keys: Float[Tensor, "B H T E"], values: Float[Tensor, "B H T E"]
    ) -> tuple["KVCache", Float[Tensor, "B H S E"], Float[Tensor, "B H S E"]]:
        """The cache with T more tokens, and the keys and values of all its S = length + T tokens.

        A full buffer is copied to one of twice the tokens, so that appending token by token copies each token O(1) times. It is
        also copied if another cache has appended to it: those tokens stay.
        """
        buffer, end = self.buffer, self.length + keys.shape[2]
        if end > buffer.keys.shape[2] or self.length < buffer.n_filled:
            padding = (0, 0, 0, max(end, 2 * self.length) - self.length)
            kept = buffer.keys[:, :, : self.length], buffer.values[:, :, : self.length]
            buffer = KVBuffer(F.pad(kept[0], padding), F.pad(kept[1], padding))
        buffer.keys[:, :, self.length : end] = keys
        buffer.values[:, :, self.length : end] = values
        buffer.n_filled = end
        return KVCache(buffer, end), buffer.keys[:, :, :end], buffer.values[:, :, :end]


def attend_to_cache(
    q: Float[Tensor, "B H T E"],
    k: Float[Tensor, "B H T E"],
    v: Float[Tensor, "B H T E"],
    cache: KVCache | None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H T E"], KVCache]:
    """Attention of the next chunk, and the cache after it. Tokens attend to all earlier ones, cached or in the chunk."""
    cache, k, v = (cache or KVCache(KVBuffer(k[:, :, :0], v[:, :, :0]))).extend(k, v)
    n_keys, n_queries = k.shape[2], q.shape[2]
    # A single query attends to every key, which needs no mask.
    mask = None if n_queries == 1 else q.new_ones(n_queries, n_keys).tril(diagonal=n_keys - n_queries).bool()
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), cache


class Attention(nn.Module):
    """GPT-2's attention sublayer: joint projection to Q, K, V, scaled dot product, output projection; all with biases.

    `score_scale` is the factor of the scores; None: 1/sqrt(E).
    """

    def __init__(self, d_model: int, n_heads: int, score_scale: float | None = None) -> None:
        super().__init__()
        self.n_heads, self.score_scale = n_heads, score_scale
        self.qkv = Linear(d_model, 3 * d_model)
        self.out = Linear(d_model, d_model)

    def _heads(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))  # pyright: ignore[reportReturnType]

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence."""
        q, k, v = self._heads(x)
        y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.score_scale)
        return self.out(y.transpose(1, 2).flatten(2))

    def advance(self, x: Float[Tensor, "B T D"], state: KVCache | None) -> tuple[Float[Tensor, "B T D"], KVCache]:
        """Outputs of the next chunk, and the cache after it."""
        y, state = attend_to_cache(*self._heads(x), state, self.score_scale)
        return self.out(y.transpose(1, 2).flatten(2)), state
