"""Short causal convolution of every channel with a kernel of its own: (B, T, D) in, (B, T, D) out.

It comes before the recurrence in Gated DeltaNet (arXiv 2412.06464, section 3.4) and in Mamba-2 (arXiv 2405.21060, section 7).
Built by mixers that let a token see its neighbours. Legend: B batch, T time, D channels, W tokens of the kernel.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models.kernels import compiled

KERNEL_TOKENS = 4  # as in both papers


class ShortConvolution(nn.Module):
    """y_t = sum_j w_j x_(t - W + 1 + j) for every channel, then SiLU if `silu` is set. No bias.

    The weight (D, W) starts uniform within 1/sqrt(W), as torch's convolutions do.
    """

    def __init__(self, channels: int, kernel_tokens: int = KERNEL_TOKENS, silu: bool = True) -> None:
        super().__init__()
        self.silu = silu
        bound = kernel_tokens**-0.5
        self.weight = nn.Parameter(torch.empty(channels, kernel_tokens).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence. The tokens before it are zeros."""
        return _Convolution.apply(x, self.weight, self.silu)  # pyright: ignore[reportReturnType]

    def advance(self, x: Float[Tensor, "B T D"], state: Tensor | None) -> tuple[Float[Tensor, "B T D"], Tensor]:
        """Outputs of the next chunk of tokens, and the state: the last W - 1 inputs (B, W - 1, D)."""
        before = self.weight.shape[1] - 1
        if state is None:
            state = x.new_zeros(x.shape[0], before, x.shape[2])
        inputs = torch.cat([state, x], 1)
        last = inputs[:, inputs.shape[1] - before :].clone()  # a view would keep all inputs of a long prompt
        return self(inputs)[:, before:], last


class _Convolution(torch.autograd.Function):
    """x (B, T, D), weight (D, W), whether SiLU follows -> (B, T, D). Keeps x and computes what SiLU got again.

    In C++ in float32 and bfloat16 on a CPU; else as a sum of shifted inputs, which takes half the time of torch's convolution
    with groups on a CPU (LOG.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, silu: bool) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.silu = silu
        if compiled.is_available(x.dtype, x.device):
            y = torch.empty_like(x)
            _call("forward", x, weight, silu, y)
            return y
        z = _convolve(x, weight)
        return F.silu(z) if silu else z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dz = gradients[0].contiguous()
        if compiled.is_available(x.dtype, x.device):
            dx, dweight = torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)
            _call("backward", x, weight, ctx.silu, dz, dx, dweight)
            return dx, dweight.to(weight.dtype), None
        if ctx.silu:
            dz = torch.ops.aten.silu_backward(dz, _convolve(x, weight))
        length, last = x.shape[1], weight.shape[1] - 1
        shifts = [(j, min(last - j, length)) for j in range(last + 1)]  # weight j reads the token that many steps before
        dx = torch.zeros_like(x)
        for j, shift in shifts:
            dx[:, : length - shift].addcmul_(dz[:, shift:], weight[:, j])
        dweight = [(dz[:, shift:] * x[:, : length - shift]).sum((0, 1)) for _, shift in shifts]
        return dx, torch.stack(dweight, 1), None


def _convolve(x: Float[Tensor, "B T D"], weight: Float[Tensor, "D W"]) -> Float[Tensor, "B T D"]:
    length, last = x.shape[1], weight.shape[1] - 1
    z = x * weight[:, last]
    for shift in range(1, min(last + 1, length)):
        z[:, shift:].addcmul_(x[:, : length - shift], weight[:, last - shift])
    return z


def _call(direction: str, x: Tensor, weight: Tensor, silu: bool, *tensors: Tensor) -> None:
    sizes = (*x.shape, weight.shape[1], int(silu))
    compiled.call(f"lmu_short_convolution_{direction}", x.dtype, sizes, (x, weight.float().contiguous(), *tensors))


def n_params(channels: int) -> int:
    """Number of trainable parameters."""
    return channels * KERNEL_TOKENS


def saved_elements(channels: int) -> int:
    """Elements per token that are saved for the backward pass."""
    return channels
