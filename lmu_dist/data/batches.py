"""Prepared tokens in, Batch out: which rows a step trains on is a pure function of (split, seed, step, rank, workers).

A checkpoint needs only the step number to go on with the same data, on any number of workers. Called by train.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token ids; targets are the inputs one token later."""

    inputs: Int[Tensor, "batch time"]
    targets: Int[Tensor, "batch time"]


class Rows:
    """A memory-mapped token stream read as rows of n + 1 tokens; neighbours share one, so every token is a target once."""

    def __init__(self, stream: Path, dtype: str, sequence_tokens: int) -> None:
        self._tokens = np.memmap(stream, dtype=dtype, mode="r") if stream.stat().st_size else np.empty(0, dtype)
        self.sequence_tokens = sequence_tokens

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self.sequence_tokens

    def batch(self, indices: Integer[np.ndarray, "batch"]) -> Batch:
        """Rows by number."""
        n = self.sequence_tokens
        tokens = torch.from_numpy(np.stack([self._tokens[i * n : (i + 1) * n + 1] for i in indices]).astype(np.int64))
        return Batch(tokens[:, :-1], tokens[:, 1:])


def row_indices(
    n_rows: int, seed: int, step: int, batch_rows: int, rank: int = 0, world_size: int = 1
) -> Integer[np.ndarray, "batch"]:
    """Numbers of the rows that `rank` trains on at `step`: its part of the global batch, in order.

    Every epoch goes through all rows once, in an order of its own; a batch may span two epochs. The ranks' parts, one
    after the other, are the batch of a single worker; they differ by a row where the workers do not divide it.
    """
    first, last = (step * batch_rows + r * batch_rows // world_size for r in (rank, rank + 1))
    positions = np.arange(first, last, dtype=np.uint64)
    epochs, places = np.divmod(positions, np.uint64(n_rows))
    return np.concatenate([shuffle(places[epochs == e], n_rows, seed, int(e)) for e in np.unique(epochs)])


def shuffle(places: Integer[np.ndarray, "batch"], n: int, seed: int, epoch: int) -> Integer[np.ndarray, "batch"]:
    """A permutation of 0 .. n-1 that is computed where asked, in O(1) memory: a Feistel network with cycle walking.

    Four rounds over two halves of the index bits (Luby and Rackoff 1988); an image of n or more is sent through again.
    Whole-number arithmetic only, so it is the same in every version of every library.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    start = np.array([(seed * 1_000_003 + epoch) % 2**64], dtype=np.uint64)
    keys = _mix(start + np.arange(1, 5, dtype=np.uint64) * _GOLDEN)
    out = places.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        out[todo] = (left << half) | right
        todo = out >= n
    return out.astype(np.int64)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Integer[np.ndarray, "..."]) -> Integer[np.ndarray, "..."]:
    """The finaliser of splitmix64 (Steele et al. 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
