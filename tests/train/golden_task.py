"""Short trainings of a table of logits in float64. tests/train/test_golden.py runs them in a separate process."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed.runtime.engine as deepspeed_engine
import numpy as np
import torch
from torch import Tensor, nn

from lmu_dist.config import ClusterConfig, TrainConfig
from lmu_dist.data.batches import TokenDataset
from lmu_dist.train.divergence import running_mean
from lmu_dist.train.engine import Engine
from lmu_dist.train.evaluate import evaluate
from lmu_dist.train.loop import train_rows

VOCAB, LENGTH, ROWS, STEPS = 13, 6, 5, 24
BATCH = ROWS * LENGTH
# All other settings have their defaults, so that a changed default changes the losses.
BASE = TrainConfig(tokens=STEPS * BATCH, batch_tokens=BATCH, sequence_tokens=LENGTH, warmup_tokens=4 * BATCH)
TRAININGS = {
    "cosine": {},
    "wsd with weight decay": {"schedule": "wsd", "weight_decay": 0.1},
    "plateau": {"plateau_patience": 1},
}


class Logits(nn.Module):
    """A minimal model: the logits of the next token are a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(7)
        self.table = nn.Parameter(torch.from_numpy(rng.standard_normal((VOCAB, VOCAB))))
        self.bias = nn.Parameter(torch.from_numpy(rng.standard_normal(VOCAB)))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Losses in nats."""
        logits = 4 * (self.table[inputs] + self.bias).flatten(0, 1)  # so that gradients are large enough to be clipped
        return nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


def trainings(changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Losses, gradient norms, running means of the loss and the last validation, by change of settings and by training."""
    # DeepSpeed 0.19 reduces float64 as well as anything, and refuses it by a list.
    deepspeed_engine.get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float64]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(1).integers(0, VOCAB, 40 * LENGTH + 1).astype("<u2").tofile(path)
        rows = TokenDataset(path, "<u2", LENGTH)
        return {
            change_name: {name: _train(rows, replace(BASE, **settings, **change)) for name, settings in TRAININGS.items()}
            for change_name, change in changes.items()
        }


def _train(rows: TokenDataset, train: TrainConfig) -> list[float]:
    engine: Any = Engine(Logits(), train, ClusterConfig(zero_stage=0, micro_batch_rows=2), torch.device("cpu"))  # pyright: ignore
    validations = [2.0, 1.9, 1.95, 1.99]  # the plateau rule acts on them after step 12
    values, mean = list[float](), None
    stream = train_rows(engine, rows, train, 5, 0, lambda: validations[: len(values) // 12])
    for metrics in stream:
        mean = running_mean(mean, metrics.loss_nats)
        values += [metrics.loss_nats, metrics.grad_norm, mean]
    result = evaluate(engine, rows, np.arange(7), 0, 1, STEPS, 2.0)
    assert math.isfinite(result.loss_nats)
    return [*values, result.loss_nats, result.standard_error_nats, result.bits_per_byte]
