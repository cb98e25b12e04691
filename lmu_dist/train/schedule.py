"""Learning rate as a pure function of the configuration, the step and the validation losses so far.

It keeps no state between steps, so a resumed run gets the same rates as an uninterrupted one. Called by launch/worker.
"""

import math
from collections.abc import Sequence

from lmu_dist.config import TrainConfig


def learning_rate(train: TrainConfig, step: int, val_losses: Sequence[float] = ()) -> float:
    """Learning rate of optimizer step `step` (0 is the first): linear warm-up, then cosine or WSD, times `plateau_scale`.

    cosine: 1/2 (1 + cos(pi x)), where x is the share of the steps after warm-up that are done.
    wsd (warmup-stable-decay): constant, then linear to zero over the last `decay_share` of all steps (Hu et al. 2024,
    arXiv 2404.06395). With `earlier_tokens` the peak is stepped: that of the smallest budget until the decay of that budget
    starts, then that of the next one, and so on. So all budgets still share a trunk, and each decays from a peak of its own. In
    OLMo-core's WSDSChinchillaRunConfigurator the option stepped_schedule steps the peak as 1/sqrt(max(c, 1)) for budgets of c
    times 20 N tokens; its only run decays at the end of each budget and goes on from there (WSD-S).
    """
    total, warmup, peak = train.n_steps, train.warmup_steps, train.peak_rate
    if train.earlier_tokens:
        peak = next((rate for end, rate in train.plateaus if step < end), peak)
    if step < warmup:
        shape = (step + 1) / warmup
    elif train.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    else:
        shape = min(1.0, (total - step) / (total - train.decay_start))
    return peak * shape * plateau_scale(train, val_losses)


def has_same_peaks(train: TrainConfig, other: TrainConfig, n_steps: int) -> bool:
    """Whether the peak learning rates of two wsd runs are the same in their first `n_steps` steps, before either decays."""

    def peaks(train: TrainConfig) -> list[tuple[int, float]]:
        starts = (0, *(end for end, _ in train.plateaus))
        return [
            (min(end, n_steps), rate) for start, (end, rate) in zip(starts, train.plateaus, strict=False) if start < n_steps
        ]

    return peaks(train) == peaks(other)


def plateau_scale(train: TrainConfig, val_losses: Sequence[float]) -> float:
    """Factor of reduce-on-plateau: plateau_factor for each `plateau_patience` evaluations in a row without a new best loss."""
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
    """`decayed` if the schedule is complete, else `undecayed`. Losses of the two phases must not be fitted together."""
    return "decayed" if steps_done >= train.n_steps else "undecayed"
