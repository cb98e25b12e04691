"""The LMU with implicit attention as the mixer of the modern block: what remains of the LMU if all around it is as in llama.

The memory and its attention are those of the family lmu (arXiv 2110.02402, section 3), with the same rules for q and q', the
same kernels, and the biases of L1, L2 and L3. The paper's block has a second feed-forward layer before the LMU, LayerNorms,
GELU and biases; this one has not. Legend: D width, Q order q, R reduced order q'.
"""

from typing import Any

import torch
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import nn

from lmu_dist.config.types import STRICT
from lmu_dist.models import counting
from lmu_dist.models.families import lmu
from lmu_dist.models.families.lmu import LMUOptions
from lmu_dist.models.mixers import output_gate, short_convolution
from lmu_dist.models.mixers.lmu import mixer
from lmu_dist.models.mixers.lmu_modern import ModernLMU
from lmu_dist.models.modern_family import ModernFamily
from lmu_dist.models.shape import Shape
from lmu_dist.models.width_transfer import width_ratio


@dataclass(frozen=True, config=STRICT)
class LMUModernOptions(LMUOptions):
    """Keys of lmu_modern under `model`: those of lmu, of which q is not fitted to N here, and three parts that other recurrent
    mixers have.
    """

    short_convolution: bool = True  # a causal convolution over 4 tokens per channel, with SiLU, before the memory
    output_gate: bool = False  # after the memory RMSNorm, a gate by the mixer's input, and a projection
    qk_norm: bool = False  # RMSNorm on Q and K of the implicit attention, scores by 1/sqrt(d_model); not in the fused form

    @field_validator("qk_norm")
    @classmethod
    def _has_form(cls, qk_norm: bool, earlier: Any) -> bool:
        if qk_norm and earlier.data.get("form") == "fused":
            raise ValueError("form=fused has no QK-norm; set qk_norm to false, or form to chunked or null")
        return qk_norm


class LMUModern(ModernFamily):
    """The LMU in the modern block."""

    name = "lmu_modern"
    version = 1
    title = "modern LMU"
    report_rank = 7
    colour, colour_dark, marker, line = "#10284a", "#2a7de1", "p", "-"
    Options = LMUModernOptions
    passive_options = ("form",)
    sizing_options = ("max_reduced_order",)
    rates_transfer = True

    def mixer(self, shape: Shape, options: LMUModernOptions) -> nn.Module:
        """Builds the LMU and the parts that the shape names."""
        return ModernLMU(
            shape.d_model,
            shape.order,
            shape.reduced_order,
            float(shape.theta_tokens),
            _form(shape, options),
            short_convolution=bool(shape.short_convolution),
            output_gate=bool(shape.output_gate),
            qk_norm=bool(shape.qk_norm),
            width_ratio=width_ratio(shape),
        )

    def mixer_widths(self, d_model: int, sequence_tokens: int, options: LMUModernOptions) -> dict[str, int] | None:
        """q and q' as in the family lmu, and 1 or 0 for each part."""
        widths = lmu.memory_widths(d_model, sequence_tokens, options)
        parts = {key: int(getattr(options, key)) for key in ("short_convolution", "output_gate", "qk_norm")}
        return widths | parts

    def mixer_params(self, shape: Shape) -> int:
        """Those of the LMU and of its parts."""
        d = shape.d_model
        convolution = shape.short_convolution * short_convolution.n_params(d)
        return lmu.mixer_params(shape) + convolution + shape.output_gate * output_gate.n_params(d) + shape.qk_norm * 2 * d

    def mixer_largest_tensor(self, shape: Shape) -> int:
        """The projection of the memory, or a matrix of the gate."""
        convolution = shape.short_convolution * short_convolution.n_params(shape.d_model)
        return max(3 * shape.reduced_order * shape.order, shape.output_gate * shape.d_model**2, convolution)

    def mixer_matmul_flops(self, shape: Shape) -> float:
        """Those of the LMU and of the gate."""
        return lmu.mixer_matmul_flops(shape) + shape.output_gate * output_gate.matmul_flops(shape.d_model)

    def mixer_fft_flops(self, shape: Shape) -> float:
        """Those of the LMU."""
        return lmu.mixer_fft_flops(shape)

    def mixer_executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of the fused form and of the gate."""
        forward, backward = lmu.mixer_executed_flops(shape, n_rows, on_gpu)
        gate = shape.output_gate * output_gate.matmul_flops(shape.d_model)
        return forward + gate, backward + 2 * gate

    def mixer_saved_elements(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of the fused form and of the parts. With QK-norm they are counted on the meta device."""
        d = shape.d_model
        if shape.qk_norm:
            with torch.device(counting.META):
                mixer = self.mixer(shape, self.options_for_counting(shape))
            n_bytes = counting.saved_bytes([mixer], d, shape.sequence_tokens, n_rows, torch.float32)
            return n_bytes / (4 * n_rows * shape.sequence_tokens), 0
        elements, float32_elements = lmu.mixer_saved_elements(shape, n_rows, on_gpu)
        if shape.short_convolution and not shape.output_gate:  # the gate saves the same input
            elements += short_convolution.saved_elements(d)
        if shape.output_gate:
            of_gate, float32_of_gate = output_gate.saved_elements(d)
            elements, float32_elements = elements + of_gate, float32_elements + float32_of_gate
        return elements, float32_elements

    def operator(self, shape: Shape, options: LMUModernOptions, dtype: torch.dtype, device: torch.device) -> str:
        """Name of the form, and of the implementation of the fused form."""
        return mixer.operator(_form(shape, options), dtype, device, shape.reduced_order)

    def options_for_counting(self, shape: Shape) -> LMUModernOptions:
        """The paper's form: torch's flop counter sees its products."""
        parts = {key: bool(shape.widths[key]) for key in ("short_convolution", "output_gate", "qk_norm")}
        return LMUModernOptions(form="fft", **parts)


def _form(shape: Shape, options: LMUModernOptions) -> mixer.Form | None:
    """The form that runs."""
    assert not (shape.qk_norm and options.form == "fused"), "the options refuse this"
    return "chunked" if shape.qk_norm and options.form is None else options.form
