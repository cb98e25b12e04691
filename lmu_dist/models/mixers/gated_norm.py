"""RMSNorm with an output gate, the last step before the output projection of Gated DeltaNet and Mamba-2: (.., E) in and out.

Legend: E channels that are normalised together.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models.kernels import compiled
from lmu_dist.models.norms import RMS_EPS


class GatedRMSNorm(nn.Module):
    """RMSNorm(x) w * silu(gate) as in Gated DeltaNet, or RMSNorm(x * silu(gate)) w if `gate_first`, as in Mamba-2.

    With several groups, each is normalised separately. Computed in float32, or in float64 if x is float64.
    """

    def __init__(self, width: int, n_groups: int = 1, gate_first: bool = False) -> None:
        super().__init__()
        self.n_groups, self.gate_first = n_groups, gate_first
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*L E"], gate: Float[Tensor, "*L E"]) -> Float[Tensor, "*L E"]:
        """The normalised and gated x, in the precision of the gate."""
        return _GatedNorm.apply(x, gate, self.weight, self.n_groups, self.gate_first)  # pyright: ignore[reportReturnType]


class _GatedNorm(torch.autograd.Function):
    """x and gate (.., E), weight (E,), groups, order -> (.., E). Keeps x, the gate and one number for each norm.

    In C++ on a CPU if x is float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, n_groups: int, gate_first: bool) -> Tensor:
        if _is_in_cpp(x, gate):
            assert x.shape == gate.shape
            x, gate = x.contiguous(), gate.contiguous()
            y, scale = torch.empty_like(gate), x.new_empty(*x.shape[:-1], n_groups, 1)
            _call("forward", gate_first, gate, x, weight, scale, (y, scale), RMS_EPS)
        else:
            opened, grouped = F.silu(gate.to(x.dtype)), (n_groups, -1)
            y = (x * opened if gate_first else x).unflatten(-1, grouped)
            scale = y.square().mean(-1, keepdim=True).add_(RMS_EPS).rsqrt_()
            y = (y * scale).flatten(-2).mul_(weight.to(x.dtype))
            y = (y if gate_first else y.mul_(opened)).to(gate.dtype)
        ctx.save_for_backward(x, gate, weight, scale)
        ctx.gate_first = gate_first
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate, weight, scale = ctx.saved_tensors
        if _is_in_cpp(x, gate):
            dx, dgate, dweight = torch.empty_like(x), torch.empty_like(gate), torch.empty_like(weight, dtype=torch.float32)
            _call("backward", ctx.gate_first, gate, x, weight, scale, (scale, gradients[0].contiguous(), dgate, dx, dweight))
            return dx, dgate, dweight.to(weight.dtype), None, None
        dy, gate_in_float = gradients[0].to(x.dtype), gate.to(x.dtype)
        opened, grouped = F.silu(gate_in_float), (scale.shape[-2], -1)
        normed = ((x * opened if ctx.gate_first else x).unflatten(-1, grouped) * scale).flatten(-2)
        dopened = None
        if not ctx.gate_first:
            dopened = (dy * normed).mul_(weight)
            dy = dy * opened
        dweight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        normed, dnormed = normed.unflatten(-1, grouped), (dy * weight).unflatten(-1, grouped)
        along = (dnormed * normed).mean(-1, keepdim=True)
        dx = dnormed.addcmul_(normed, along, value=-1).mul_(scale).flatten(-2)
        if dopened is None:
            dopened, dx = dx * x, dx * opened
        dgate = torch.ops.aten.silu_backward(dopened, gate_in_float).to(gate.dtype)
        return dx, dgate, dweight, None, None


def _call(
    direction: str,
    gate_first: bool,
    gate: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    tensors: tuple[Tensor, ...],
    *factors: float,
) -> None:
    n_groups = scale.shape[-2]
    sizes = (scale.numel() // n_groups, n_groups, x.shape[-1] // n_groups, int(gate_first))
    given = (gate, x, weight.float().contiguous())
    compiled.call(f"lmu_gated_norm_{direction}", gate.dtype, sizes, (*given, *tensors), *factors)


def _is_in_cpp(x: Tensor, gate: Tensor) -> bool:
    return x.dtype == torch.float32 and compiled.is_available(gate.dtype, gate.device)
