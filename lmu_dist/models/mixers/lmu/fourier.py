"""The LMU operator on a processor: convolutions by Fourier transforms that stay in a core's cache, then the reader.

Kernels in pairs make complex spectra; kernels/convolve.cpp multiplies and transforms sixteen channels at once and writes the
readings where the reader finds them. They are kept for the way back, and their gradients written over them. Called by lmu.
Legend: B batch, T time, D width, R reduced order, K = 3R readings, P pairs of kernels, n points of a transform,
W the width in whole lanes.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Complex64, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lmu_dist.models.accounting import LANES, transform_points
from lmu_dist.models.kernels import compiled, reader
from lmu_dist.models.precision import product_dtype


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Where there is a compiler; but not in bfloat16 on a processor with tiles for it, whose products should be faster."""
    return reader.implementation(dtype, device) == "c++" and product_dtype(dtype, device) == torch.float32


@lru_cache(maxsize=32)
def order(n: int) -> Int[Tensor, "n"]:
    """Which frequency stands where after decimation in frequency by four, and at last by two."""
    if n <= 2:
        return torch.arange(n)
    within = 4 * order(n // 4)
    return torch.cat([within + k for k in range(4)])


def _in_lanes(x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T W"]:
    # Vectors that begin where cache lines do; zeros take no part in the reader.
    return F.pad(x, (0, -x.shape[-1] % LANES)).contiguous()


def _spectra(kernels: Float[Tensor, "K T"], n: int) -> Complex64[Tensor, "P n"]:
    first, second = F.pad(kernels, (0, 0, 0, len(kernels) % 2)).unflatten(0, (-1, 2)).unbind(1)
    return torch.fft.fft(torch.complex(first, second), n)[:, order(n)].contiguous()


def _kernels_back(dspectra: Complex64[Tensor, "P n"], length: int, n_readings: int) -> Float[Tensor, "K T"]:
    sorted_ = torch.empty_like(dspectra)
    sorted_[:, order(dspectra.shape[1])] = dspectra
    pairs = torch.fft.ifft(sorted_)[:, :length]
    return torch.stack([pairs.real, pairs.imag], 1).flatten(0, 1)[:n_readings]


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, bias: Tensor, p: Tensor, n: int) -> Tensor:
        (b, t, d), k = x.shape, len(kernels)
        inputs, spectra = _in_lanes(x.float()), _spectra(kernels.float(), n)
        width = inputs.shape[2]
        pre, out = x.new_empty(k, b * t * width), x.new_empty(b * t, 1, width)
        sizes = (b, t, d, k, n)
        compiled.call("lmu_convolve", x.dtype, sizes, (inputs, spectra, bias.float().contiguous(), pre))
        reader.read(pre, p, out)
        ctx.save_for_backward(inputs, spectra, pre, p)
        ctx.sizes, ctx.reach, ctx.dtypes = sizes, kernels.shape[1], (x.dtype, kernels.dtype, bias.dtype)
        return out.view(b, t, width)[..., :d]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, spectra, pre, p = ctx.saved_tensors
        _, _, d, k, _ = ctx.sizes
        of_x, of_kernels, of_bias = ctx.dtypes
        # Its gradient is written over it, which autograd cannot see, and it must not be used a second time.
        torch.autograd.graph.increment_version(pre)
        dp, dbias = torch.zeros_like(p, dtype=torch.float32), torch.zeros(k)
        dx, dspectra = torch.empty_like(inputs), torch.zeros_like(spectra)
        reader.read_back(pre, p, _in_lanes(dout.to(pre.dtype)).flatten(0, 1).unsqueeze(1), dp)
        compiled.call("lmu_convolve_back", pre.dtype, ctx.sizes, (inputs, spectra, pre, dx, dspectra, dbias))
        dkernels = _kernels_back(dspectra, ctx.reach, k)
        return dx[..., :d].to(of_x), dkernels.to(of_kernels), dbias.to(of_bias), dp.to(p.dtype), None


def attended(
    x: Float[Tensor, "B T D"],
    reading: Float[Tensor, "K Q"],
    bias: Float[Tensor, "K"],
    p: Float[Tensor, "R"],
    theta_tokens: float,
    response: Float[Tensor, "Q T"],
) -> Float[Tensor, "B T D"]:
    """Implicit attention to the memory at every token; `reading` in the basis of the memory's response."""
    n = transform_points(x.shape[1], reading.shape[1], theta_tokens)
    # Beyond half the points are tokens that are forgotten.
    return _Attended.apply(x, reading @ response[:, : n // 2], bias, p, n)
