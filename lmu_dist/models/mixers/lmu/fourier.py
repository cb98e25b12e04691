"""The LMU on a CPU: convolutions by Fourier transforms that stay in a core's cache, then the attention kernel.

Two convolution kernels make one complex spectrum. kernels/convolve.cpp transforms and multiplies a vector of channels at once
and writes the pre-activations in the layout of the attention kernel. They are kept for the backward pass, which overwrites
them with their gradients. Called by mixer.

Legend: B batch, T time, D width, Q order, R reduced order, K = 3R rows of the projection, P = (K + 1) / 2 pairs of convolution
kernels, n points of a transform, W the width rounded up to whole cache lines (kernels/lanes.h).
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lmu_dist.array_types import Complex64, Float, Int
from lmu_dist.models.kernels import compiled, implicit_attention
from lmu_dist.models.kernels.compiled import LINE
from lmu_dist.models.mixers.lmu import legendre
from lmu_dist.models.precision import product_dtype


def transform_points(length: int, order: int, theta_tokens: float) -> int:
    """Number n of points of the Fourier transforms that convolve `length` tokens on a CPU.

    n is a power of two. Half of it holds the sequence, or as many tokens as the memory remembers if that is less.
    """
    # The memory remembers at least one window, so that a sequence within the window needs no further look.
    kernel_tokens = length if length <= theta_tokens else min(length, legendre.memory_tokens(order, theta_tokens))
    return max(16, 2 ** math.ceil(math.log2(2 * kernel_tokens)))


def executed_flops(
    length: int, order: int, theta_tokens: float, n_projections: int, width: int, n_rows: int
) -> tuple[float, float]:
    """FLOPs per token of `fused_lmu` before its attention: forward, and backward. A vector of channels counts in full.

    Counts the additions and multiplications of kernels/transform.h and convolve.cpp, and the spectra of the kernels, by torch's
    complex transforms at 5 n log2 n.
    """
    n = transform_points(length, order, theta_tokens)
    kernel_tokens, pairs = min(length, n // 2), (n_projections + 1) // 2
    segments = n_rows * (width + -width % LINE) * -(-length // (n // 2))
    first_pass = n // 4  # of a transform: number of its butterflies, half of whose points are zeros or not wanted
    padded, truncated = 26 * first_pass + 4 * _transform_flops(n // 4), 30 * first_pass + 4 * _transform_flops(n // 4)
    accumulate = 16 * n  # conj(w) z and its sum, conj(x) z and its sum over channels
    kernels = 2 * n_projections * order * kernel_tokens + pairs * 5 * n * math.log2(n)
    forward = segments * (_transform_flops(n) + pairs * (6 * n + truncated)) + kernels
    backward = segments * (2 * _transform_flops(n) + pairs * (padded + accumulate)) + kernels
    return forward / (n_rows * length), backward / (n_rows * length)


def _transform_flops(size: int) -> int:
    """Additions and multiplications of a complex transform by radix 4 (kernels/transform.h)."""
    return {4: 16, 8: 84}.get(size) or 34 * (size // 4) + 4 * _transform_flops(size // 4)


def is_supported(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the C++ kernels run there and are the faster choice.

    On CPUs with AMX tiles they are not for bfloat16: matrix products should be faster than transforms there.
    """
    return implicit_attention.implementation(dtype, device) == "c++" and product_dtype(dtype, device) == torch.float32


@lru_cache(maxsize=32)
def frequency_order(n: int) -> Int[Tensor, "n"]:
    """Frequency at each position of a spectrum after decimation in frequency, radix 4 with a last radix-2 stage if needed."""
    if n <= 2:
        return torch.arange(n, device="cpu")
    quarter = 4 * frequency_order(n // 4)
    return torch.cat([quarter + k for k in range(4)])


def _pad_to_lanes(x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T W"]:
    # Vectors then begin at cache lines. Zero channels contribute nothing to the attention.
    return F.pad(x, (0, -x.shape[-1] % LINE)).contiguous()


def _kernel_spectra(kernels: Float[Tensor, "K T"], n: int) -> Complex64[Tensor, "P n"]:
    first, second = F.pad(kernels, (0, 0, 0, len(kernels) % 2)).unflatten(0, (-1, 2)).unbind(1)
    return torch.fft.fft(torch.complex(first, second), n)[:, frequency_order(n)].contiguous()


def _kernel_spectra_backward(dspectra: Complex64[Tensor, "P n"], length: int, n_kernels: int) -> Float[Tensor, "K T"]:
    in_order = torch.empty_like(dspectra)
    in_order[:, frequency_order(dspectra.shape[1])] = dspectra
    pairs = torch.fft.ifft(in_order)[:, :length]
    return torch.stack([pairs.real, pairs.imag], 1).flatten(0, 1)[:n_kernels]


class _FusedLMU(torch.autograd.Function):
    """The output is (B T, 1, W): `fused_lmu` makes its view, since autograd refuses changes in place of one made here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, bias: Tensor, p: Tensor, n: int, score_scale: float) -> Tensor:
        (b, t, d), k = x.shape, len(kernels)
        inputs, spectra = _pad_to_lanes(x.float()), _kernel_spectra(kernels.float(), n)
        width = inputs.shape[2]
        pre, out = x.new_empty(k, b * t * width), x.new_empty(b * t, 1, width)
        sizes = (b, t, d, k, n)
        compiled.call("lmu_convolve_forward", x.dtype, sizes, (inputs, spectra, bias.float().contiguous(), pre))
        implicit_attention.forward(pre, p, out, score_scale)
        ctx.save_for_backward(inputs, spectra, pre, p)
        ctx.sizes, ctx.kernel_tokens, ctx.score_scale = sizes, kernels.shape[1], score_scale
        ctx.dtypes = (x.dtype, kernels.dtype, bias.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, spectra, pre, p = ctx.saved_tensors
        _, _, d, k, _ = ctx.sizes
        x_dtype, kernels_dtype, bias_dtype = ctx.dtypes
        pre = implicit_attention.overwritable(pre)  # the kernel overwrites it with its gradient
        dp, dbias = torch.zeros_like(p, dtype=torch.float32), inputs.new_zeros(k)
        dx, dspectra = torch.empty_like(inputs), torch.zeros_like(spectra)
        implicit_attention.backward(pre, p, dout.to(pre.dtype).contiguous(), dp, ctx.score_scale)
        compiled.call("lmu_convolve_backward", pre.dtype, ctx.sizes, (inputs, spectra, pre, dx, dspectra, dbias))
        dkernels = _kernel_spectra_backward(dspectra, ctx.kernel_tokens, k)
        return dx[..., :d].to(x_dtype), dkernels.to(kernels_dtype), dbias.to(bias_dtype), dp.to(p.dtype), None, None


def fused_lmu(
    x: Float[Tensor, "B T D"],
    projection: Float[Tensor, "K Q"],
    bias: Float[Tensor, "K"],
    p: Float[Tensor, "R"],
    theta_tokens: float,
    response: Float[Tensor, "Q T"],
    score_scale: float = 1.0,
) -> Float[Tensor, "B T D"]:
    """The LMU of whole sequences, with `projection` and the memory's impulse response in the same basis."""
    n = transform_points(x.shape[1], projection.shape[1], theta_tokens)
    # The memory forgets inputs older than n / 2 tokens.
    out = _FusedLMU.apply(x, projection @ response[:, : n // 2], bias, p, n, score_scale)
    return out.view(*x.shape[:2], out.shape[-1])[..., : x.shape[2]]
