"""When a run has diverged: the losses so far in, a rule in words out. Called by launch/worker after every step."""

import math

from lmu_dist.config import TrainConfig


def running_mean(mean: float | None, loss: float) -> float:
    """The mean over about the last ten steps, as an exponential average; single batches are too noisy to judge by."""
    return loss if mean is None else 0.9 * mean + 0.1 * loss


def diverged(train: TrainConfig, mean_loss: float, best_mean_loss: float) -> str:
    """The rule by which a run has diverged; "" while it has not."""
    if not math.isfinite(mean_loss):
        return "non-finite loss"
    if mean_loss > train.divergence_factor * best_mean_loss:
        return f"running mean of the loss above {train.divergence_factor:g} times its best"
    return ""
