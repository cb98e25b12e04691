"""Functions that the ranks run in tests of the engine. In a module of their own, so that spawned processes can import them."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lmu_dist.config import ClusterConfig, TrainConfig
from lmu_dist.data.batches import Batch, TokenDataset, row_indices
from lmu_dist.models import head
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.sizing import shape_for
from lmu_dist.train.engine import Engine
from lmu_dist.train.evaluate import evaluate
from lmu_dist.train.loop import train_steps
from lmu_dist.train.schedule import learning_rate

VOCAB, LENGTH, ROWS = 61, 16, 8
TRAIN = TrainConfig(
    learning_rate=1e-2,
    beta2=0.999,
    tokens=20 * ROWS * LENGTH,
    batch_tokens=ROWS * LENGTH,
    sequence_tokens=LENGTH,
    warmup_tokens=5 * ROWS * LENGTH,
)


def model(family: str = "lmu") -> LanguageModel:
    return LanguageModel(shape_for(family, 3000, vocab_tokens=VOCAB, sequence_tokens=LENGTH), seed=3)


def batch(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """A rank's share of a batch of random rows. The global batch is the same for any number of ranks."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (40, LENGTH + 1))
    rows = torch.from_numpy(tokens[row_indices(40, 5, step, ROWS, rank, world_size)])
    return Batch(rows[:, :-1], rows[:, 1:])


def plain_adam(family: str = "lmu", n_steps: int = 20) -> list[float]:
    """Losses of the same training in plain torch: one process, one thread, no DeepSpeed."""
    torch.set_num_threads(1)
    net = model(family)
    adam = torch.optim.Adam(net.parameters(), betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.eps)
    losses = []
    for step in range(n_steps):
        for group in adam.param_groups:
            group["lr"] = learning_rate(TRAIN, step)
        loss = net(batch(step).inputs, batch(step).targets).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), TRAIN.clip_norm)
        adam.step()
        losses.append(loss.item())
    return losses


def _engine(stage: int, micro_rows: int | None = None, train: TrainConfig = TRAIN) -> Engine:
    return Engine(model(), train, ClusterConfig(zero_stage=stage, micro_batch_rows=micro_rows), torch.device("cpu"))


def _train(engine: Engine, first: int, last: int) -> list:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rates = [learning_rate(TRAIN, step) for step in range(last)]
    stream = train_steps(engine, lambda s: batch(s, rank, world_size), rates.__getitem__, first, last, TRAIN.batch_tokens)
    return list(stream)


def train_stages(stages: list[int], micro_rows: int | None = None) -> dict[int, tuple[list[float], list[float], dict]]:
    """Losses, gradient norms and final weights of 20 steps, by ZeRO stage."""
    results = {}
    for stage in stages:
        engine = _engine(stage, micro_rows)
        metrics = _train(engine, 0, 20)
        results[stage] = [m.loss_nats for m in metrics], [m.grad_norm for m in metrics], engine.weights()
    return results


def train_with_blocked_head(stages: list[int]) -> dict[int, tuple[list[float], list[float], dict]]:
    """As `train_stages`, with cross-entropy in blocks of a few rows of logits."""
    head.MAX_LOGITS = 10 * VOCAB
    return train_stages(stages)


def train_and_resume(stages: list[int], folder: str) -> dict[int, tuple[list[float], list[float]]]:
    """By ZeRO stage: losses of 20 uninterrupted steps, and of 10 steps, save, load in a new engine, 10 steps."""
    results = {}
    for stage in stages:
        uninterrupted = _train(_engine(stage), 0, 20)
        first = _engine(stage)
        before = _train(first, 0, 10)
        first.save(Path(folder) / str(stage))
        dist.barrier()
        second = _engine(stage)
        second.load(Path(folder) / str(stage))
        after = _train(second, 10, 20)
        results[stage] = [m.loss_nats for m in uninterrupted], [m.loss_nats for m in before + after]
    return results


def train_and_save(
    stage: int, folder: str, first: int, last: int, loaded_from: str = "", converted: bool = False
) -> list[float]:
    """Losses of steps first .. last - 1, resumed from `loaded_from` if given. Saves the state after them to `folder`."""
    engine = _engine(stage)
    if loaded_from:
        engine.load(Path(loaded_from), converted)
    metrics = _train(engine, first, last)
    engine.save(Path(folder))
    return [m.loss_nats for m in metrics]


def bf16_stages() -> dict[int, list[float]]:
    """Losses in bf16, by ZeRO stage."""
    train = TrainConfig(**{**TRAIN.__dict__, "precision": "bf16"})
    return {stage: [m.loss_nats for m in _train(_engine(stage, train=train), 0, 20)] for stage in (0, 1, 2, 3)}


def non_finite(stage: int) -> tuple[list[float], bool]:
    """Losses until one is not finite, and whether that step left the weights unchanged."""
    engine = _engine(stage)
    _train(engine, 0, 2)
    with torch.no_grad():
        engine.model.norm.bias.fill_(torch.inf)
    before = engine.weights()
    metrics = _train(engine, 2, 20)
    after = engine.weights()
    same = all(torch.equal(before[k], after[k]) for k in before)
    return [m.loss_nats for m in metrics], same


def evaluate_on(path: str, n_rows: int, micro_rows: int | None = None) -> object:
    """Evaluates an untrained model on a token stream."""
    rows = TokenDataset(Path(path), "<u2", LENGTH)
    return evaluate(_engine(1, micro_rows), rows, n_rows, dist.get_rank(), dist.get_world_size(), 0, bytes_per_token=2.0)
