"""The training loop: a generator of StepMetrics. It uses neither Ray, MLflow nor files.

Its caller, launch/worker, decides when to evaluate, save and log. There is no other loop.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from lmu_dist.config import TrainConfig
from lmu_dist.data.batches import Batch, TokenDataset, prefetch, row_indices
from lmu_dist.records import StepMetrics
from lmu_dist.train.engine import Engine
from lmu_dist.train.schedule import learning_rate


def train_rows(
    engine: Engine,
    rows: TokenDataset,
    train: TrainConfig,
    seed: int,
    first_step: int,
    val_losses: Callable[[], Sequence[float]],
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[StepMetrics]:
    """Runs the steps of a run from `first_step` on: which rows and which learning rate each step takes.

    `val_losses` returns the validation losses so far, in nats: the plateau rule reads them.
    """

    def batch_at(step: int) -> Batch:
        return rows.batch(row_indices(len(rows), seed, step, train.batch_rows, rank, world_size))

    def learning_rate_at(step: int) -> float:
        return learning_rate(train, step, val_losses())

    return train_steps(engine, batch_at, learning_rate_at, first_step, train.n_steps, train.batch_tokens)


def train_steps(
    engine: Engine,
    batch_at: Callable[[int], Batch],
    learning_rate_at: Callable[[int], float],
    first_step: int,
    n_steps: int,
    batch_tokens: int,
) -> Iterator[StepMetrics]:
    """Runs optimizer steps first_step .. n_steps - 1 and yields the metrics of each. Stops after a step that is not finite.

    `batch_at` runs in another thread, one step ahead. The seconds of a step include waiting for its batch.
    """
    # Closed with this generator, so that its thread ends when the caller stops early.
    with closing(prefetch(batch_at, first_step, n_steps, engine.device)) as batches:
        for step in range(first_step, n_steps):
            began = time.perf_counter()
            rate = learning_rate_at(step)
            loss, norm = engine.step(next(batches), rate)
            elapsed = time.perf_counter() - began
            metrics = StepMetrics(step, (step + 1) * batch_tokens, loss, norm, rate, elapsed)
            yield metrics
            if not metrics.finite:
                return
