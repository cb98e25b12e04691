"""Divergence check: running mean of the training loss in, the reason for stopping out. Called by launch/worker every step."""

import math

from lmu_dist.config import TrainConfig


def running_mean(mean: float | None, loss: float) -> float:
    """Exponential moving average of the loss over about ten steps. The loss of a single batch is too noisy to compare."""
    return loss if mean is None else 0.9 * mean + 0.1 * loss


def divergence_reason(train: TrainConfig, mean_loss: float, best_mean_loss: float) -> str:
    """Why the run counts as diverged, as text; "" if it has not diverged."""
    if not math.isfinite(mean_loss):
        return "non-finite loss"
    if mean_loss > train.divergence_factor * best_mean_loss:
        return f"running mean of the loss above {train.divergence_factor:g} times its best"
    return ""
