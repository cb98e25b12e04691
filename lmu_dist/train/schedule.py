"""Learning rate as a pure function of the configuration, the step and the validation losses so far.

Nothing is remembered between steps, so a resumed run has the rate of an uninterrupted one. Called by launch/worker.
"""

import math
from collections.abc import Sequence

from lmu_dist.config import TrainConfig


def learning_rate(train: TrainConfig, step: int, val_losses: Sequence[float] = ()) -> float:
    """Rate of optimizer step `step` (0 is the first): linear warm-up, then cosine to zero, or WSD; times the plateau.

    cosine: 1/2 (1 + cos(pi x)), x the share of the steps after warm-up that are done.
    wsd: constant, then linear to zero over the last `decay_share` of all steps (Hu et al. 2024, arXiv 2404.06395).
    """
    total, warmup = train.n_steps, train.warmup_steps
    if step < warmup:
        shape = (step + 1) / warmup
    elif train.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    else:
        shape = min(1.0, (total - step) / (total - train.decay_start))
    return train.learning_rate * shape * plateau_scale(train, val_losses)


def plateau_scale(train: TrainConfig, val_losses: Sequence[float]) -> float:
    """plateau_factor once for every `plateau_patience` evaluations in a row that brought no new best loss."""
    if not train.plateau_patience:
        return 1.0
    scale, best, waited = 1.0, math.inf, 0
    for loss in val_losses:
        if loss < best:
            best, waited = loss, 0
        else:
            waited += 1
        if waited == train.plateau_patience:
            scale, waited = scale * train.plateau_factor, 0
    return scale


def phase(train: TrainConfig, steps_done: int) -> str:
    """`decayed` if the schedule came to its end, else `undecayed`: losses of the two must never meet in one fit."""
    return "decayed" if steps_done >= train.n_steps else "undecayed"
