"""The LMU family (arXiv 2110.02402, section 3), and the parameters, FLOPs and activations of its mixer.

A block is feed-forward, LMU with implicit self-attention, feed-forward. Legend: D width, Q order q of the memory, R reduced
order q', K = 3R, n sequence length.
"""

import math
from collections.abc import Iterator

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from lmu_dist.config.types import STRICT, Count
from lmu_dist.models.counting import bytes_of
from lmu_dist.models.family import Family, paper_d_model
from lmu_dist.models.kernels.compiled import LINE
from lmu_dist.models.mixers import feed_forward
from lmu_dist.models.mixers.feed_forward import FeedForward
from lmu_dist.models.mixers.lmu import chunked, fourier, mixer
from lmu_dist.models.recipe import KAPLAN
from lmu_dist.models.shape import Shape
from lmu_dist.models.width_transfer import width_ratio

PAPER_REDUCED_ORDER_PER_WIDTH = 25 / 204  # the paper's largest model: q' = 25 at d = 204
PAPER_ORDERS_PER_ROW = 10  # q = 250 at q' = 25


@dataclass(frozen=True, config=STRICT)
class LMUOptions:
    """Keys of the LMU under `model`. None: q' = 25/204 d, at most max_reduced_order, and q = 10 q' as in the paper; q is fitted
    to N and at most theta.
    """

    order: Count | None = None  # Legendre order q of the memory
    reduced_order: Count | None = None  # reduced order q': rows of the projections of the memory
    theta_tokens: Count | None = None  # window theta of the memory in tokens; None: the sequence length
    form: mixer.Form | None = None  # algorithm; None: the fastest on the device. Equal results
    max_reduced_order: Count = 25  # largest q' that follows from d; 25, and so q = 250, are those of the paper's largest model


class LMU(Family):
    """The language model of the LMU paper."""

    name = "lmu"
    version = 1
    title = "LMU"
    report_rank = 0
    colour, colour_dark, marker, line = "#0072b2", "#56b4e9", "o", "-"
    recipe = KAPLAN
    Options = LMUOptions
    passive_options = ("form",)
    sizing_options = ("max_reduced_order",)
    rates_transfer = True

    def mixer(self, shape: Shape, options: LMUOptions) -> nn.Module:
        """Builds the LMU."""
        return mixer.LMU(shape.order, shape.reduced_order, float(shape.theta_tokens), options.form, width_ratio(shape))

    def sublayers(self, shape: Shape, options: LMUOptions) -> Iterator[nn.Module]:
        """Builds FFN, LMU, FFN for each block."""
        for _ in range(shape.n_blocks):
            yield FeedForward(shape.d_model, shape.d_ff)
            yield self.mixer(shape, options)
            yield FeedForward(shape.d_model, shape.d_ff)

    def widths(self, d_model: int, sequence_tokens: int, options: LMUOptions) -> dict[str, int] | None:
        """Those of the memory. The feed-forward width is a free width."""
        return {"d_ff": 1, **memory_widths(d_model, sequence_tokens, options)}

    def free_widths(self, blank: Shape, options: LMUOptions, n_params: int) -> Iterator[tuple[str, int, int]]:
        """The feed-forward width; then the order within a third of its value, unless `options` set it."""
        yield "d_ff", 1, 4 * n_params
        if options.order is None:
            least, most = max(1, blank.order - blank.order // 3), min(blank.order + blank.order // 3, blank.theta_tokens)
            yield "order", least, max(least, most)

    def nominal_d_model(self, n_params: int, n_blocks: int, sequence_tokens: int, options: LMUOptions) -> float:
        """sqrt(N / (12 n_blocks)), as in the paper."""
        return paper_d_model(n_params, n_blocks)

    def n_sublayers(self, shape: Shape) -> int:
        """Three per block."""
        return 3 * shape.n_blocks

    def n_params(self, shape: Shape) -> int:
        """Two feed-forward layers and the mixer per block."""
        return shape.n_blocks * (mixer_params(shape) + 2 * feed_forward.n_params(shape.d_model, shape.d_ff))

    def largest_tensor(self, shape: Shape) -> int:
        """The projection of the memory or a feed-forward matrix."""
        return max(3 * shape.reduced_order * shape.order, shape.d_model * shape.d_ff)

    def matmul_flops(self, shape: Shape) -> float:
        """Two feed-forward layers and the mixer per block."""
        return shape.n_blocks * (mixer_matmul_flops(shape) + 2 * feed_forward.matmul_flops(shape.d_model, shape.d_ff))

    def fft_flops(self, shape: Shape) -> float:
        """Those of the mixers."""
        return shape.n_blocks * mixer_fft_flops(shape)

    def executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """Those of the fused form and of two feed-forward layers per block."""
        forward, backward = mixer_executed_flops(shape, n_rows, on_gpu)
        others = 2 * feed_forward.matmul_flops(shape.d_model, shape.d_ff)
        return shape.n_blocks * (forward + others), shape.n_blocks * (backward + 2 * others)

    def activation_bytes(self, shape: Shape, n_rows: int, precision: str, on_gpu: bool) -> float:
        """Bytes that the fused form saves."""
        per_token, float32_per_token = mixer_saved_elements(shape, n_rows, on_gpu)
        per_token += 2 * feed_forward.saved_elements(shape.d_model, shape.d_ff)
        return n_rows * shape.sequence_tokens * shape.n_blocks * (per_token * bytes_of(precision) + 4 * float32_per_token)

    def operator(self, shape: Shape, options: LMUOptions, dtype: torch.dtype, device: torch.device) -> str:
        """Name of the form, and of the implementation of the fused form."""
        return mixer.operator(options.form, dtype, device, shape.reduced_order)

    def options_for_counting(self, shape: Shape) -> LMUOptions:
        """The paper's form: torch's flop counter sees its products."""
        return LMUOptions(form="fft")


def memory_widths(d_model: int, sequence_tokens: int, options: LMUOptions) -> dict[str, int]:
    """q' = 25/204 d, at most max_reduced_order, and q = 10 q' as in the paper's largest model, unless `options` set them.

    q is at most theta, because a window of theta tokens has only theta independent coefficients. In wider models than the
    paper's, more orders would cost more operations than all other sublayers together.
    """
    theta = options.theta_tokens or sequence_tokens
    by_rule = max(1, min(round(d_model * PAPER_REDUCED_ORDER_PER_WIDTH), theta // PAPER_ORDERS_PER_ROW))
    rows = options.reduced_order or min(by_rule, options.max_reduced_order)
    order = options.order or min(PAPER_ORDERS_PER_ROW * rows, theta)
    return {"order": order, "reduced_order": rows, "theta_tokens": theta}


def mixer_params(shape: Shape) -> int:
    """Trainable parameters of one LMU: projections, their biases, and p."""
    return 3 * shape.reduced_order * shape.order + 3 * shape.reduced_order + shape.reduced_order


def mixer_matmul_flops(shape: Shape) -> int:
    """Forward FLOPs per token of one LMU in matrix products.

    The product L H is computed once for all rows of a batch. It is counted for every row, as in the paper's table.
    """
    d, r = shape.d_model, shape.reduced_order
    return 6 * r * shape.order + 2 * d * r * r + 2 * r * r + 2 * d * r


def mixer_fft_flops(shape: Shape) -> float:
    """Forward FLOPs per token of one LMU in transforms: 5/2 m log2 m per real one of m = 2n points, 6 per complex product.

    Counts the paper's form, whichever form runs, so that the compute of a study does not depend on its hardware.
    """
    k, d, m = 3 * shape.reduced_order, shape.d_model, 2 * shape.sequence_tokens
    transforms = d + k + k * d
    return (transforms * 2.5 * m * math.log2(m) + 6 * k * d * (m / 2 + 1)) / shape.sequence_tokens


def mixer_executed_flops(shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
    """FLOPs per token that the fused form of one LMU executes for `n_rows` rows at once: forward, and backward.

    On a CPU these are the transforms and elementwise products of kernels/convolve.cpp, for whole vectors of channels. On a GPU
    these are the products of mixers/lmu/chunked. The attention follows in both cases; its backward pass computes the scores
    again, and Triton pads q' to a power of two of at least 16. Elementwise operations of the attention are not counted.
    """
    n, k, d = shape.sequence_tokens, 3 * shape.reduced_order, shape.d_model
    if on_gpu:
        chunk = chunked.chunk_tokens(shape.order, k, d, n, n_rows)
        forward, backward = (2 * count for count in chunked.multiply_adds(shape.order, k, d, n, n_rows, chunk))
        rows = max(16, 2 ** math.ceil(math.log2(shape.reduced_order)))
    else:
        forward, backward = fourier.executed_flops(n, shape.order, shape.theta_tokens, k, d, n_rows)
        rows, d = shape.reduced_order, d + -d % LINE
    scores, mean = 2 * d * rows**2, 2 * rows**2 + 2 * d * rows  # Q K^T; p A and (p A) V
    return forward + scores + mean, backward + 3 * scores + mean + 2 * rows**2


def mixer_saved_elements(shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
    """Elements per token that one LMU saves for the backward pass: (in the model's precision, in float32 always).

    On a CPU it saves the projected memory. On a GPU it recomputes the projected memory from the saved features of the chunks.
    """
    n, k, d = shape.sequence_tokens, 3 * shape.reduced_order, shape.d_model
    if not on_gpu:
        spectra = (k + k % 2) * fourier.transform_points(n, shape.order, shape.theta_tokens)  # complex spectra of the kernels
        width = d + -d % LINE
        return k * width, width + spectra / (n * n_rows)
    chunk = chunked.chunk_tokens(shape.order, k, d, n, n_rows)
    features = chunked.n_features(shape.order, chunk, n)
    return (d * -(-n // chunk) + chunk * k / n_rows) * features / n, 0  # features of all chunks and their projection weights
