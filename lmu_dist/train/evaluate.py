"""Validation loss: rows of the validation split in, EvalMetrics out (nats per token, bits per byte, loss by position).

Legend: B batch, T time. Collective over all ranks; called by launch/worker.
"""

import math

import numpy as np
import torch

from lmu_dist.array_types import Integer
from lmu_dist.data.batches import TokenDataset
from lmu_dist.records import EvalMetrics
from lmu_dist.train.engine import Engine


def evaluated_rows(rows: TokenDataset, n_tokens: int) -> Integer[np.ndarray, "rows"]:
    """Numbers of the rows that stand for a split: about `n_tokens` tokens, at least one row, spread evenly over the split.

    The start of a split may come from a single source: documents keep the order of the corpus files.
    """
    n_rows = min(len(rows), max(1, n_tokens // rows.sequence_tokens))
    return np.arange(n_rows, dtype=np.int64) * len(rows) // n_rows


def evaluate(
    engine: Engine,
    rows: TokenDataset,
    indices: Integer[np.ndarray, "rows"],
    rank: int,
    world_size: int,
    step: int,
    bytes_per_token: float,
) -> EvalMetrics:
    """Mean loss over the rows with these numbers, divided among the ranks. The standard error is that of the mean over rows.

    bits_per_byte = nats / ln 2 / bytes_per_token, where bytes_per_token is the split's bytes of text per token.
    """
    n_rows = len(indices)
    per_rank = -(-n_rows // world_size)
    mine = np.arange(rank * per_rank, (rank + 1) * per_rank)
    chunk = engine.micro_rows
    by_position = torch.zeros(rows.sequence_tokens, dtype=torch.float64)
    sums = torch.zeros(2, dtype=torch.float64)  # of row means, of their squares
    # All ranks run the same number of passes, because ZeRO 3 gathers weights in each. Rows past the end get weight 0.
    for start in range(0, per_rank, chunk):
        positions = mine[start : start + chunk]
        valid = torch.from_numpy(positions < n_rows).double()
        losses = engine.losses(rows.batch(indices[np.minimum(positions, n_rows - 1)]))
        by_position += (losses * valid[:, None]).sum(0)
        means = losses.mean(1) * valid
        sums += torch.stack([means.sum(), means.square().sum()])
    by_position = engine.sum_over_ranks(by_position) / n_rows
    total, squares = engine.sum_over_ranks(sums).tolist()
    mean = total / n_rows
    variance = max(0.0, squares / n_rows - mean**2) * n_rows / max(1, n_rows - 1)
    return EvalMetrics(
        step=step,
        loss_nats=mean,
        standard_error_nats=math.sqrt(variance / n_rows),
        bits_per_byte=mean / math.log(2) / bytes_per_token,
        n_rows=n_rows,
        position_loss_nats=tuple(by_position.tolist()),
    )
