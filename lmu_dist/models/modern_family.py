"""The block of the modern families, and their base class: they differ in their mixer only. Derived by models/families.

A block is x <- x + mixer(RMSNorm(x)), x <- x + SwiGLU(RMSNorm(x)), without biases outside the mixer, as in Llama (arXiv
2302.13971, section 2.2) and Qwen3 (arXiv 2505.09388). There are no learned positions, and the head is tied to the embedding.
Everything but the mixer is here, once: so a comparison of llama, gated_deltanet, mamba2 and lmu_modern compares mixers. Legend:
B batch, T time, D width, N non-embedding parameters.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from torch import nn

from lmu_dist.models.counting import bytes_of
from lmu_dist.models.family import Family, paper_d_model
from lmu_dist.models.mixers import swiglu
from lmu_dist.models.mixers.swiglu import SwiGLU
from lmu_dist.models.norms import Norm
from lmu_dist.models.shape import Shape


class ModernBlock(Family):
    """The block around the mixers, and the sums of all counts. Subclasses must define `mixers` and `parts`.

    At equal N all of them have a d_model near sqrt(N / (12 n_blocks)), which heads of attention may round. The width d_ff of
    SwiGLU is fitted to N: a mixer with fewer parameters has wider feed-forward layers.
    """

    version: ClassVar[int | str] = 1  # of the block: raise it together with the versions of all derived families
    norm: ClassVar[Norm] = "rms"

    @abstractmethod
    def mixers(self, shape: Shape, options: Any) -> Iterable[nn.Module]:
        """Builds the mixers of all blocks, one at a time."""

    @abstractmethod
    def parts(self, shape: Shape) -> Sequence[tuple["ModernFamily", Shape, int]]:
        """The families whose mixers the blocks have, each with its shape and its number of blocks."""

    def sublayers(self, shape: Shape, options: Any) -> Iterator[nn.Module]:
        """Builds the mixer and SwiGLU for each block."""
        for mixer in self.mixers(shape, options):
            yield mixer
            yield SwiGLU(shape.d_model, shape.d_ff)

    def nominal_d_model(self, n_params: int, n_blocks: int, sequence_tokens: int, options: Any) -> float:
        """sqrt(N / (12 n_blocks)), as the paper's families: attention then has d_ff = 8/3 d_model, as in Llama."""
        return paper_d_model(n_params, n_blocks)

    def n_sublayers(self, shape: Shape) -> int:
        """Two per block."""
        return 2 * shape.n_blocks

    def n_params(self, shape: Shape) -> int:
        """Mixer and SwiGLU per block."""
        mixers = sum(n * family.mixer_params(part) for family, part, n in self.parts(shape))
        return mixers + shape.n_blocks * swiglu.n_params(shape.d_model, shape.d_ff)

    def largest_tensor(self, shape: Shape) -> int:
        """That of the mixers, or the joint matrix of SwiGLU."""
        mixers = [family.mixer_largest_tensor(part) for family, part, _ in self.parts(shape)]
        return max(*mixers, swiglu.largest_tensor(shape.d_model, shape.d_ff))

    def matmul_flops(self, shape: Shape) -> float:
        """Mixer and SwiGLU per block."""
        mixers = sum(n * family.mixer_matmul_flops(part) for family, part, n in self.parts(shape))
        return mixers + shape.n_blocks * swiglu.matmul_flops(shape.d_model, shape.d_ff)

    def fft_flops(self, shape: Shape) -> float:
        """Those of the mixers."""
        return sum(n * family.mixer_fft_flops(part) for family, part, n in self.parts(shape))

    def executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of the mixer, and of SwiGLU, per block."""
        forward = shape.n_blocks * swiglu.matmul_flops(shape.d_model, shape.d_ff)
        backward = 2 * forward
        for family, part, n in self.parts(shape):
            of_mixer = family.mixer_executed_flops(part, n_rows, on_gpu)
            forward, backward = forward + n * of_mixer[0], backward + n * of_mixer[1]
        return forward, backward

    def activation_bytes(self, shape: Shape, n_rows: int, precision: str, on_gpu: bool) -> float:
        """Bytes that the mixer and SwiGLU save."""
        per_token = shape.n_blocks * swiglu.saved_elements(shape.d_model, shape.d_ff) * bytes_of(precision)
        for family, part, n in self.parts(shape):
            elements, float32_elements = family.mixer_saved_elements(part, n_rows, on_gpu)
            per_token += n * (elements * bytes_of(precision) + 4 * float32_elements)
        return n_rows * shape.sequence_tokens * per_token


class ModernFamily(ModernBlock):
    """A family with one kind of mixer in all blocks.

    Subclasses must define `mixer`, `mixer_widths`, and the counts of one mixer: `mixer_params`, `mixer_largest_tensor`,
    `mixer_matmul_flops` and `mixer_saved_elements`. They may define `mixer_fft_flops` and `mixer_executed_flops`. tests/models
    compares the counts with the model.
    """

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

    def mixers(self, shape: Shape, options: Any) -> Iterator[nn.Module]:
        """Builds `mixer` for every block."""
        return (self.mixer(shape, options) for _ in range(shape.n_blocks))

    def parts(self, shape: Shape) -> Sequence[tuple["ModernFamily", Shape, int]]:
        """This family in all blocks."""
        return [(self, shape, shape.n_blocks)]

    def widths(self, d_model: int, sequence_tokens: int, options: Any) -> dict[str, int] | None:
        """The mixer's widths. The width of SwiGLU is a free width."""
        widths = self.mixer_widths(d_model, sequence_tokens, options)
        return None if widths is None else {"d_ff": 1, **widths}
