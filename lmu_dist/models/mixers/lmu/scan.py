"""Parallel scan of a linear recurrence: what every chunk adds to the memory in, the memory after every chunk out.

Called by chunked on GPUs. Legend: Q order, N chunks, W columns (rows of the batch times channels), C tokens of a chunk.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lmu_dist.array_types import Float


@lru_cache(maxsize=128)
def _square(matrix: Tensor) -> Tensor:
    return matrix @ matrix


def scan_products(n_chunks: int) -> int:
    """Number of products of A with the memory of one chunk that `parallel_scan` of so many chunks takes."""
    return n_chunks // 2 + (n_chunks - 1) // 2 + scan_products(n_chunks // 2) if n_chunks > 1 else 0


def parallel_scan(
    added: Float[Tensor, "Q N W"], a_pow_chunk: Float[Tensor, "Q Q"], transpose: bool = False
) -> Float[Tensor, "Q N W"]:
    """Memory after every chunk, m_i = A m_(i-1) + added_i with A = Abar^C (or its transpose), in 2 log N products.

    Pairs of chunks are scanned with A^2, pairs of pairs with A^4, and so on. That is twice the arithmetic of a loop, but an
    error passes log N products instead of N: the precision of `added` suffices, where a loop needs float64, which most GPUs are
    slow at. The powers of A are computed in float64 nevertheless, once.
    """
    n = added.shape[1]
    if n == 1:
        return added
    a = (a_pow_chunk.T if transpose else a_pow_chunk).to(added.dtype)

    def one_chunk_later(m: Tensor) -> Tensor:
        return (a @ m.flatten(1)).view_as(m)

    pairs = added[:, 1::2] + one_chunk_later(added[:, : n - 1 : 2])
    odd = parallel_scan(pairs, _square(a_pow_chunk), transpose)  # after chunks 1, 3, 5 ..
    after = torch.empty_like(added)
    after[:, 0], after[:, 1::2] = added[:, 0], odd
    after[:, 2::2] = added[:, 2::2] + one_chunk_later(odd[:, : (n - 1) // 2])
    return after
