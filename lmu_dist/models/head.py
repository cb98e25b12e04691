"""Cross-entropy of a linear head without its logits: features (N, D), weight (V, D), targets (N,) in, nats (N,) out.

With 50,257 tokens the logits of a batch are larger than all else in a step together. Here a block of them exists at a time, in
one buffer, and becomes gradients there at once: those of a loss that weighs all targets alike, as the mean does. Under another
one the blocks are made again. Called by lm. Legend: N tokens, V vocabulary, D width.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lmu_dist.models.accounting import LOGITS
from lmu_dist.models.precision import product_dtype


def linear_cross_entropy(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """-log softmax(x weight^T) at each row's target, float32 or better."""
    if x.shape[0] * weight.shape[0] <= LOGITS:
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
    return _LinearCrossEntropy.apply(x, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses, *gradients = _blocks(x, weight, targets, None, any(ctx.needs_input_grad))
        ctx.save_for_backward(x, weight, targets, *gradients)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, targets, dx, dw = ctx.saved_tensors
        if bool((dloss == dloss[0]).all()):
            dx, dw = dx * dloss[0], dw * dloss[0]
        else:
            _, dx, dw = _blocks(x, weight, targets, dloss, True)
        return dx.to(x.dtype), dw.to(weight.dtype), None


def _blocks(x: Tensor, weight: Tensor, targets: Tensor, dloss: Tensor | None, back: bool) -> tuple[Tensor, ...]:
    """Losses; and `back`, gradients of their sum, weighed by dloss if given, with respect to x and weight."""
    w = weight.to(product_dtype(weight.dtype, weight.device))
    exact = torch.promote_types(w.dtype, torch.float32)
    inputs, rows = x.to(w.dtype), max(1, LOGITS // len(weight))
    losses = torch.empty(len(x), dtype=exact, device=x.device)
    dx, dw = torch.empty_like(inputs), torch.zeros(w.shape if back else 0, dtype=exact, device=w.device)
    # One buffer for all: allocators seldom give a block of this size the place of the one before.
    buffer = torch.empty(min(rows, len(x)), len(weight), dtype=w.dtype, device=w.device)
    for i in range(0, len(x), rows):
        here = slice(i, i + rows)
        features, wanted = inputs[here], targets[here, None]
        logits = torch.mm(features, w.T, out=buffer[: len(features)]).to(exact)
        chosen = logits.gather(1, wanted)
        largest = logits.amax(1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(1, keepdim=True)
        losses[here] = (total.log() + largest - chosen)[:, 0]
        if not back:
            continue
        # softmax = e / total; what has a factor for every row goes to the narrow sides, which saves passes over logits.
        logits.scatter_add_(1, wanted, -total)
        by = 1 / total if dloss is None else dloss[here, None] / total
        off = logits.to(w.dtype)
        dx[here] = (off @ w).to(exact).mul_(by).to(dx.dtype)
        scaled = (features.to(exact) * by).to(w.dtype)
        if w.dtype == exact:
            dw.addmm_(off.T, scaled)
        else:
            dw += off.T @ scaled
    return losses, dx, dw
