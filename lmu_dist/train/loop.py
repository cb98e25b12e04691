"""The training loop: a generator of StepMetrics. It uses neither Ray, MLflow nor files.

Its caller, launch/worker, decides when to evaluate, save and log. There is no other loop.
"""

import time
from collections.abc import Callable, Iterator

from lmu_dist.data.batches import Batch
from lmu_dist.records import StepMetrics
from lmu_dist.train.engine import Engine


def train_steps(
    engine: Engine,
    batch_at: Callable[[int], Batch],
    learning_rate_at: Callable[[int], float],
    first_step: int,
    n_steps: int,
    batch_tokens: int,
) -> Iterator[StepMetrics]:
    """Runs optimizer steps first_step .. n_steps - 1 and yields the metrics of each. Stops after a step that is not finite."""
    for step in range(first_step, n_steps):
        began = time.perf_counter()
        rate = learning_rate_at(step)
        loss, norm = engine.step(batch_at(step), rate)
        elapsed = time.perf_counter() - began
        metrics = StepMetrics(step, (step + 1) * batch_tokens, loss, norm, rate, elapsed)
        yield metrics
        if not metrics.finite:
            return
