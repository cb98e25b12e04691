"""Gated DeltaNet (arXiv 2412.06464) in the modern block, and the widths and counts of its mixer.

Legend: D width, H heads, K and V channels of a key and of a value, n sequence length.
"""

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from lmu_dist.config.types import STRICT, Count
from lmu_dist.models.kernels import gated_delta_rule as kernel
from lmu_dist.models.mixers import gated_delta_rule, gated_deltanet, gpu_kernels
from lmu_dist.models.mixers.gated_deltanet import GatedDeltaNet as Mixer
from lmu_dist.models.modern_family import ModernFamily
from lmu_dist.models.precision import recurrence_dtype
from lmu_dist.models.recipe import GATED_DELTANET
from lmu_dist.models.shape import Shape, power_of_two

KEYS_PER_WIDTH = 3 / 4  # H K = 3/4 D, as in the paper's code (fla), where the mixer has about 6 D^2 parameters
HEADS_OF_NARROW_MODELS = 4  # the fewest that the rule gives, where keys have between 16 and 256 channels
KEY_WIDTHS = (16, 256)


@dataclass(frozen=True, config=STRICT)
class GatedDeltaNetOptions:
    """Keys of Gated DeltaNet under `model`. None: by rule from d_model."""

    n_heads: Count | None = None  # heads H; None: 3/4 d_model divided by key_width
    key_width: Count | None = None  # channels K of a key; None: a power of two, 16 to 256, that gives at least 4 heads
    value_expansion: Count = 2  # channels of a value per channel of a key; 2 in the paper's code and in Qwen3-Next


class GatedDeltaNet(ModernFamily):
    """The gated delta rule with short convolutions and an output gate in place of attention."""

    name = "gated_deltanet"
    version = 1
    title = "Gated DeltaNet"
    report_rank = 5
    colour, colour_dark, marker, line = "#3a1fc0", "#9388ff", "P", "--"
    Options = GatedDeltaNetOptions
    rates_transfer = True
    recipe = GATED_DELTANET
    sizing_options = ("value_expansion",)

    def mixer(self, shape: Shape, options: GatedDeltaNetOptions) -> nn.Module:
        """Builds the gated delta rule and the projections around it."""
        return Mixer(shape.d_model, *_heads(shape))

    def mixer_widths(self, d_model: int, sequence_tokens: int, options: GatedDeltaNetOptions) -> dict[str, int] | None:
        """At d_model = 2,048 the rule gives 6 heads of 256, the default of the paper's code; in narrower models fewer channels.

        Below 16 channels the memory of a head, K V numbers, holds little: so models of d_model < 86 have fewer heads than 4.
        """
        keys, (least, most) = KEYS_PER_WIDTH * d_model, KEY_WIDTHS
        by_rule = min(max(power_of_two(keys / HEADS_OF_NARROW_MODELS), min(least, power_of_two(keys))), most)
        key_width = options.key_width or by_rule
        n_heads = options.n_heads or max(1, round(keys / key_width))
        return {"n_heads": n_heads, "key_width": key_width, "value_width": options.value_expansion * key_width}

    def mixer_params(self, shape: Shape) -> int:
        """Projections, convolution, decays and norm."""
        return gated_deltanet.n_params(shape.d_model, *_heads(shape))

    def mixer_largest_tensor(self, shape: Shape) -> int:
        """The joint projection to q, k, v."""
        return shape.d_model * shape.n_heads * (2 * shape.key_width + shape.value_width)

    def mixer_matmul_flops(self, shape: Shape) -> float:
        """The projections, and the chunked rule."""
        return gated_deltanet.matmul_flops(shape.d_model, *_heads(shape), shape.sequence_tokens)

    def mixer_executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of the chunked rule in plain torch. Token by token, as in C++, the rule executes fewer."""
        forward = self.mixer_matmul_flops(shape)
        again = shape.n_heads * gated_delta_rule.recomputed_flops(shape.sequence_tokens, shape.key_width)
        return forward, 2 * forward + again

    def mixer_saved_elements(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Of the rule in C++ on a CPU; on a GPU of the chunked rule in plain torch, and the kernels of fla-core save less."""
        return gated_deltanet.saved_elements(shape.d_model, *_heads(shape), shape.sequence_tokens, on_gpu)

    def operator(self, shape: Shape, options: GatedDeltaNetOptions, dtype: torch.dtype, device: torch.device) -> str:
        """Token by token in C++, chunked in plain torch, or the kernels of fla-core on a GPU."""
        if kernel.is_available(recurrence_dtype(dtype), device):
            return "token by token, c++"
        return gpu_kernels.operator_name("gated_delta_rule", dtype, device, shape.key_width)


def _heads(shape: Shape) -> tuple[int, int, int]:
    return shape.n_heads, shape.key_width, shape.value_width
