"""Initial values of decays that Gated DeltaNet and Mamba-2 share: exp(-dt A), with a rate A and a step dt for every head.

Drawn on the CPU with the seed of the model, in the precision in which modules are built.
"""

import math

import torch
from torch import Tensor

from lmu_dist.array_types import Float

LARGEST_RATE = 16.0  # of the code of both papers
STEPS = (0.001, 0.1)  # dt_min and dt_max of the code of both papers


def draw_rates(n_heads: int, smallest: float) -> Float[Tensor, "H"]:
    """Decay rates A > 0, uniform in smallest .. LARGEST_RATE."""
    return torch.empty(n_heads).uniform_(smallest, LARGEST_RATE)


def draw_step_bias(n_heads: int) -> Float[Tensor, "H"]:
    """The bias b at which softplus(b), the step of a token whose projection is 0, is log-uniform in STEPS."""
    low, high = map(math.log, STEPS)
    step = torch.empty(n_heads).uniform_(low, high).exp()
    return step + (-torch.expm1(-step)).log()
