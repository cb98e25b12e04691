"""Matrix products of layers, which take float32 operands where the processor has no bfloat16 arithmetic.

There bfloat16 is stored and never multiplied: operands are converted block by block, sums are float32, and results are rounded
to bfloat16, as processors with such arithmetic do. torch would compute these products in plain loops (LOG.md). Everywhere else,
and for all other precisions, these are torch's own functions. Used by the mixers, head and network.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models.precision import has_bfloat16_products

BLOCK_ROWS = 2048  # rows converted to float32 at a time: few megabytes, and long enough for full speed


def uses_float32(x: Tensor) -> bool:
    """Whether products of this tensor take float32 operands: bfloat16 on a CPU without its arithmetic."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_bfloat16_products()


def linear(
    x: Float[Tensor, "*N D"], weight: Float[Tensor, "E D"], bias: Float[Tensor, "E"] | None = None
) -> Float[Tensor, "*N E"]:
    """x weight^T + bias, with gradients in the precision of each tensor."""
    return _Linear.apply(x, weight, bias) if uses_float32(x) else F.linear(x, weight, bias)  # pyright: ignore[reportReturnType]


class Linear(nn.Linear):
    """torch's linear layer, by `linear`."""

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N E"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Applies the layer to the last dimension."""
        return linear(x, self.weight, self.bias)


def scaled_dot_product_attention(
    q: Float[Tensor, "B H T E"], k: Float[Tensor, "B H S E"], v: Float[Tensor, "B H S E"], **options: Any
) -> Float[Tensor, "B H T E"]:
    """torch's function of this name."""
    if uses_float32(q):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)


class _Linear(torch.autograd.Function):
    """`linear` in float32 of bfloat16 tensors: keeps the bfloat16 tensors only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        rows, w, b = x.reshape(-1, x.shape[-1]), weight.float(), None if bias is None else bias.float()
        out = x.new_empty(len(rows), len(weight))
        for i in range(0, len(rows), BLOCK_ROWS):
            out[i : i + BLOCK_ROWS] = F.linear(rows[i : i + BLOCK_ROWS].float(), w, b)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows, w, drows = x.reshape(-1, x.shape[-1]), weight.float(), dout.reshape(-1, len(weight))
        dx, dw, db = torch.empty_like(rows), torch.zeros_like(w), w.new_zeros(len(weight))
        for i in range(0, len(rows), BLOCK_ROWS):
            d = drows[i : i + BLOCK_ROWS].float()
            if ctx.needs_input_grad[0]:
                dx[i : i + BLOCK_ROWS] = d @ w
            dw.addmm_(d.T, rows[i : i + BLOCK_ROWS].float())
            if ctx.has_bias:
                db += d.sum(0)
        return dx.view(x.shape), dw.to(weight.dtype), db.to(weight.dtype) if ctx.has_bias else None
