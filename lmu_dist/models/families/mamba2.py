"""Mamba-2 (arXiv 2405.21060) in the modern block, and the widths and counts of its mixer.

The paper's own model stacks mixers without feed-forward layers. Here every mixer is followed by SwiGLU, as in the other modern
families, so that a comparison changes the mixer only.
"""

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from lmu_dist.config.types import STRICT, Count
from lmu_dist.models.kernels import ssd as kernel
from lmu_dist.models.mixers import gpu_kernels, mamba2, ssd
from lmu_dist.models.mixers.mamba2 import Mamba2 as Mixer
from lmu_dist.models.modern_family import ModernFamily
from lmu_dist.models.precision import recurrence_dtype
from lmu_dist.models.recipe import MAMBA
from lmu_dist.models.shape import Shape, power_of_two

STATE_LIMIT = 128  # N of the paper's models; narrower models than that have the largest power of two that is not above D
HEAD_WIDTHS = (8, 64)  # P of the paper's models is 64


@dataclass(frozen=True, config=STRICT)
class Mamba2Options:
    """Keys of Mamba-2 under `model`. None: by rule from d_model."""

    d_state: Count | None = None  # channels N of the state; None: the largest power of two up to d_model, at most 128
    head_width: Count | None = None  # channels P of a head; None: the largest power of two up to d_model / 4, from 8 to 64
    expand: Count = 2  # channels of all heads per d_model
    n_groups: Count = 1  # groups of heads that share B and C; must divide the number of heads


class Mamba2(ModernFamily):
    """A state space with one decay for every head, with a short convolution and an output gate, in place of attention."""

    name = "mamba2"
    version = 1
    title = "Mamba-2"
    report_rank = 6
    colour, colour_dark, marker, line = "#4d4b09", "#f5eba2", "X", "-."
    Options = Mamba2Options
    rates_transfer = True
    recipe = MAMBA
    sizing_options = ("expand",)

    def mixer(self, shape: Shape, options: Mamba2Options) -> nn.Module:
        """Builds the state space and the projections around it."""
        return Mixer(shape.d_model, *_sizes(shape))

    def mixer_widths(self, d_model: int, sequence_tokens: int, options: Mamba2Options) -> dict[str, int]:
        """From d_model = 256 on N = 128, P = 64 and one group, as in the paper's models; about 8 heads in narrower models.

        The heads have `expand` d_model channels in all, rounded to whole heads and groups, and each group has one head or more.
        """
        least, most = HEAD_WIDTHS
        head_width = options.head_width or min(max(power_of_two(d_model // 4), least), most)
        n_heads = max(1, round(options.expand * d_model / (head_width * options.n_groups))) * options.n_groups
        d_state = options.d_state or min(power_of_two(d_model), STATE_LIMIT)
        return {"n_heads": n_heads, "head_width": head_width, "d_state": d_state, "n_groups": options.n_groups}

    def mixer_params(self, shape: Shape) -> int:
        """Projections, convolution, decays, skips and norm."""
        return mamba2.n_params(shape.d_model, *_sizes(shape))

    def mixer_largest_tensor(self, shape: Shape) -> int:
        """The joint projection to x, B, C."""
        return shape.d_model * (shape.n_heads * shape.head_width + 2 * shape.n_groups * shape.d_state)

    def mixer_matmul_flops(self, shape: Shape) -> float:
        """The projections, and the chunked recurrence at the chunk length that runs on a CPU."""
        return mamba2.matmul_flops(shape.d_model, *_sizes(shape), shape.sequence_tokens)

    def mixer_executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of the chunked recurrence in plain torch, also on a GPU. C++ executes about as many for 32 tokens or more."""
        forward = self.mixer_matmul_flops(shape)
        return forward, 2 * forward + ssd.recomputed_flops(shape.sequence_tokens, *_sizes(shape))

    def mixer_saved_elements(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Of the recurrence in C++ on a CPU; on a GPU of that in plain torch, and the kernels of fla-core save less."""
        return mamba2.saved_elements(shape.d_model, *_sizes(shape), shape.sequence_tokens, on_gpu)

    def operator(self, shape: Shape, options: Mamba2Options, dtype: torch.dtype, device: torch.device) -> str:
        """Chunked, in C++ or in plain torch, or the kernels of fla-core on a GPU."""
        if kernel.is_available(recurrence_dtype(dtype), device):
            return "chunked, c++"
        return gpu_kernels.operator_name("simple_gla", dtype, device, shape.d_state)


def _sizes(shape: Shape) -> tuple[int, int, int, int]:
    return shape.n_heads, shape.head_width, shape.d_state, shape.n_groups
