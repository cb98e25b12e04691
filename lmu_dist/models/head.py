"""Cross-entropy of a linear head without its logits: features (N, D), weight (V, D), targets (N,) in, nats (N,) out.

With 50,257 tokens the logits of a batch are larger than all else in a step together. Here a block of them exists at a time, and
they are made again on the way back; only the logarithm of each row's sum of exponentials is kept. Called by lm.
Legend: N tokens, V vocabulary, D width.
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
        rows = max(1, LOGITS // len(weight))
        w = weight.to(product_dtype(weight.dtype, weight.device))
        total, chosen = list[Tensor](), list[Tensor]()
        for features, wanted in zip(x.to(w.dtype).split(rows), targets.split(rows), strict=True):
            logits = _logits(features, w)
            chosen.append(logits.gather(1, wanted[:, None])[:, 0])
            largest = logits.amax(1)
            total.append(logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest))
        log_total = torch.cat(total)
        ctx.save_for_backward(x, weight, targets, log_total)
        return log_total - torch.cat(chosen)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        x, weight, targets, log_total = ctx.saved_tensors
        rows = max(1, LOGITS // len(weight))
        w = weight.to(product_dtype(weight.dtype, weight.device))
        inputs = x.to(w.dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
        for i in range(0, len(x), rows):
            here = slice(i, i + rows)
            off = _logits(inputs[here], w).sub_(log_total[here, None]).exp_()  # probabilities, less 1 at the target
            off[torch.arange(len(off), device=off.device), targets[here]] -= 1
            off = off.to(w.dtype)
            by = dloss[here, None]  # meets the narrow sides: one pass over logits less
            dx[here] = ((off @ w).to(by.dtype) * by).to(dx.dtype)
            scaled = (inputs[here].to(by.dtype) * by).to(w.dtype)
            if dw.dtype == w.dtype:
                dw.addmm_(off.T, scaled)
            else:
                dw += off.T @ scaled
        return dx, dw.to(weight.dtype), None


def _logits(x: Tensor, w: Tensor) -> Tensor:
    logits = x @ w.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
