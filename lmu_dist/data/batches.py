"""Batches: prepared tokens in, Batch out. The rows of a step are a pure function of (split, seed, step, rank, workers).

To resume with the same data, a checkpoint needs only the step number, on any number of workers. Called by train.
"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmu_dist.array_types import Int, Integer


@dataclass(frozen=True)
class Batch:
    """Token ids of inputs and targets. Targets are the inputs shifted by one token."""

    inputs: Int[Tensor, "batch time"]
    targets: Int[Tensor, "batch time"]

    def pinned(self) -> "Batch":
        """A copy in page-locked memory, from which a GPU copies while the CPU goes on."""
        return Batch(self.inputs.contiguous().pin_memory(), self.targets.contiguous().pin_memory())


def prefetch(
    batch_at: Callable[[int], Batch], first_step: int, n_steps: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Yields batch_at(step) of the steps first_step .. n_steps - 1. A thread reads the next batch while this one is in use.

    Batches for a GPU are page-locked. An error of `batch_at` is raised when its batch is due. Closing the generator waits for
    the batch that is being read; no thread remains.
    """

    def read(step: int) -> Batch:
        batch = batch_at(step)
        if device.type != "cuda":
            return batch
        torch.cuda.set_device(device)  # the current device belongs to the thread
        return batch.pinned()

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as reader:
        upcoming = reader.submit(read, first_step)
        for step in range(first_step, n_steps):
            batch = upcoming.result()
            if step + 1 < n_steps:
                upcoming = reader.submit(read, step + 1)
            yield batch


class TokenDataset:
    """A memory-mapped token stream as rows of n + 1 tokens. Neighbouring rows share a token: every token is a target once."""

    def __init__(self, stream: Path, dtype: str, sequence_tokens: int) -> None:
        self._tokens = np.memmap(stream, dtype=dtype, mode="r") if stream.stat().st_size else np.empty(0, dtype)
        self.sequence_tokens = sequence_tokens

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self.sequence_tokens

    def batch(self, indices: Integer[np.ndarray, "batch"]) -> Batch:
        """The batch of the rows with these numbers."""
        n = self.sequence_tokens
        tokens = torch.from_numpy(np.stack([self._tokens[i * n : (i + 1) * n + 1] for i in indices]).astype(np.int64))
        return Batch(tokens[:, :-1], tokens[:, 1:])


def row_indices(
    n_rows: int, seed: int, step: int, batch_rows: int, rank: int = 0, world_size: int = 1
) -> Integer[np.ndarray, "batch"]:
    """Numbers of the rows that `rank` trains on at `step`: its share of the global batch, in order.

    Each epoch visits all rows once, in an order of its own; a batch may span two epochs. Concatenated over ranks, the shares
    are the batch of a single worker. They differ by one row if `world_size` does not divide `batch_rows`.
    """
    first, last = (step * batch_rows + r * batch_rows // world_size for r in (rank, rank + 1))
    positions = np.arange(first, last, dtype=np.uint64)
    epochs, offsets = np.divmod(positions, np.uint64(n_rows))
    return np.concatenate([shuffle(offsets[epochs == e], n_rows, seed, int(e)) for e in np.unique(epochs)])


def shuffle(positions: Integer[np.ndarray, "batch"], n: int, seed: int, epoch: int) -> Integer[np.ndarray, "batch"]:
    """Maps positions through a pseudo-random permutation of 0 .. n-1 in O(1) memory: a Feistel network with cycle walking.

    Four rounds over the two halves of the index bits (Luby and Rackoff 1988). An output of n or more goes through the network
    again. It uses integer arithmetic only, so the result does not depend on library versions.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    start = np.array([(seed * 1_000_003 + epoch) % 2**64], dtype=np.uint64)
    keys = _mix(start + np.arange(1, 5, dtype=np.uint64) * _GOLDEN)
    out = positions.astype(np.uint64)
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
