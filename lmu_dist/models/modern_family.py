"""ModernFamily: the base class of families that differ in their mixer only. A derived family gives its mixer and its counts.

A block is x <- x + mixer(RMSNorm(x)), x <- x + SwiGLU(RMSNorm(x)), without biases outside the mixer, as in Llama (arXiv
2302.13971, section 2.2) and Qwen3 (arXiv 2505.09388). There are no learned positions, and the head is tied to the embedding.
The families of models/families derive from it: llama, gated_deltanet, mamba2, lmu_modern and hybrid. So a comparison of two of
them compares mixers: everything else is here, once. Legend: B batch, T time, D width, N non-embedding parameters.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import nn

from lmu_dist.models.counting import bytes_of
from lmu_dist.models.family import Family, paper_d_model
from lmu_dist.models.mixers import swiglu
from lmu_dist.models.mixers.swiglu import SwiGLU
from lmu_dist.models.norms import Norm
from lmu_dist.models.shape import Shape


class ModernFamily(Family):
    """The block around the mixer, and the sums of its counts.

    Subclasses must define `mixer`, `mixer_widths`, `mixer_params`, `mixer_largest_tensor`, `mixer_matmul_flops` and
    `mixer_saved_elements`, all of one mixer, and may define `mixer_fft_flops` and `mixer_executed_flops`. tests/models compares
    these counts with the model.

    At equal N all of them have the same d_model = sqrt(N / (12 n_blocks)), and the width d_ff of SwiGLU is fitted to N: a mixer
    with fewer parameters has wider feed-forward layers.
    """

    version: ClassVar[int | str] = 1  # of the block: raise it together with the versions of all derived families
    norm: ClassVar[Norm] = "rms"

    @abstractmethod
    def mixer_widths(self, d_model: int, sequence_tokens: int, options: Any) -> dict[str, int] | None:
        """The mixer's widths at a d_model, and all options that change its number of parameters. None: not possible."""

    @abstractmethod
    def mixer_params(self, shape: Shape) -> int:
        """Trainable parameters of one mixer."""

    @abstractmethod
    def mixer_largest_tensor(self, shape: Shape) -> int:
        """Elements of the largest trainable tensor of one mixer."""

    @abstractmethod
    def mixer_matmul_flops(self, shape: Shape) -> float:
        """Forward FLOPs per token of one mixer in matrix products, as torch's counter sees them."""

    @abstractmethod
    def mixer_saved_elements(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Elements per token that one mixer saves for the backward pass: (in the model's precision, in float32 always)."""

    def mixer_fft_flops(self, shape: Shape) -> float:
        """Forward FLOPs per token of one mixer in Fourier transforms."""
        return 0.0

    def mixer_executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """FLOPs per token that one mixer executes for `n_rows` rows at once: forward, and backward."""
        forward = self.mixer_matmul_flops(shape) + self.mixer_fft_flops(shape)
        return forward, 2 * forward

    def sublayers(self, shape: Shape, options: Any) -> Iterator[nn.Module]:
        """Builds the mixer and SwiGLU for each block."""
        for mixer in self.mixers(shape, options):
            yield mixer
            yield SwiGLU(shape.d_model, shape.d_ff)

    def mixers(self, shape: Shape, options: Any) -> Iterable[nn.Module]:
        """Builds the mixers of all blocks, one at a time."""
        return (self.mixer(shape, options) for _ in range(shape.n_blocks))

    def widths(self, d_model: int, sequence_tokens: int, options: Any) -> dict[str, int] | None:
        """The mixer's widths. The width of SwiGLU is a free width."""
        widths = self.mixer_widths(d_model, sequence_tokens, options)
        return None if widths is None else {"d_ff": 1, **widths}

    def nominal_d_model(self, n_params: int, n_blocks: int, sequence_tokens: int, options: Any) -> float:
        """sqrt(N / (12 n_blocks)), as the paper's families: attention then has d_ff = 8/3 d_model, as in Llama."""
        return paper_d_model(n_params, n_blocks)

    def n_sublayers(self, shape: Shape) -> int:
        """Two per block."""
        return 2 * shape.n_blocks

    def n_params(self, shape: Shape) -> int:
        """Mixer and SwiGLU per block."""
        return shape.n_blocks * (self.mixer_params(shape) + swiglu.n_params(shape.d_model, shape.d_ff))

    def largest_tensor(self, shape: Shape) -> int:
        """That of the mixer, or the joint matrix of SwiGLU."""
        return max(self.mixer_largest_tensor(shape), swiglu.largest_tensor(shape.d_model, shape.d_ff))

    def matmul_flops(self, shape: Shape) -> float:
        """Mixer and SwiGLU per block."""
        return shape.n_blocks * (self.mixer_matmul_flops(shape) + swiglu.matmul_flops(shape.d_model, shape.d_ff))

    def fft_flops(self, shape: Shape) -> float:
        """Those of the mixers."""
        return shape.n_blocks * self.mixer_fft_flops(shape)

    def executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of the mixer, and of SwiGLU, per block."""
        forward, backward = self.mixer_executed_flops(shape, n_rows, on_gpu)
        others = swiglu.matmul_flops(shape.d_model, shape.d_ff)
        return shape.n_blocks * (forward + others), shape.n_blocks * (backward + 2 * others)

    def activation_bytes(self, shape: Shape, n_rows: int, precision: str, on_gpu: bool) -> float:
        """Bytes that the mixer and SwiGLU save."""
        per_token, float32_per_token = self.mixer_saved_elements(shape, n_rows, on_gpu)
        per_token += swiglu.saved_elements(shape.d_model, shape.d_ff)
        return n_rows * shape.sequence_tokens * shape.n_blocks * (per_token * bytes_of(precision) + 4 * float32_per_token)
