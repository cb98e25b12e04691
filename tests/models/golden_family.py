"""A family of shared parts only, for tests/models/test_golden.py: its golden losses move only if these parts change."""

from typing import Any

import torch
from torch import Tensor, nn

from lmu_dist.models.family import Family
from lmu_dist.models.shape import Shape


class RunningMean(nn.Module):
    """The mean of all tokens so far, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]


class Shared(Family):
    """Embedding, norms, feed-forward layers, skip connections and head around a mixer that is trivial."""

    name = "shared"
    learned_positions = True

    def mixer(self, shape: Shape, options: Any) -> nn.Module:
        """A running mean."""
        return RunningMean()
