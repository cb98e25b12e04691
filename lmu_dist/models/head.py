"""Cross-entropy of a linear head in blocks of logits: features (N, D), weight (V, D), targets (N,) in, nats (N,) out.

With 50,257 tokens the logits of a batch would be larger than everything else in a training step together. Here only one block
of them exists at a time, in one buffer, and is turned into gradients at once. These are the gradients of a loss with equal
weights for all targets, such as losses.sum() / N; under other weights the backward pass computes the blocks again. Called by
lm. Legend: N tokens, V vocabulary, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lmu_dist.array_types import Float, Int
from lmu_dist.models.precision import product_dtype
from lmu_dist.models.products import linear

MAX_LOGITS = 2**23  # more logits than these are computed in blocks; on a CPU also the size of a block: 32 MB in float32
# A block on a GPU: 2,670 rows at V = 50,257. The (V, D) gradient is read and written once per block, so blocks are large.
GPU_BLOCK_LOGITS = 2**27


def block_logits(on_gpu: bool) -> int:
    """Largest number of logits in a block."""
    return GPU_BLOCK_LOGITS if on_gpu else MAX_LOGITS


def linear_cross_entropy(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """-log softmax(x weight^T) at each row's target, float32 or better."""
    if x.shape[0] * weight.shape[0] <= MAX_LOGITS:
        logits = linear(x, weight)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
    return _LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, grad_enabled: bool) -> Tensor:
        # Under no_grad() a weight still says that it needs a gradient, so evaluation would compute gradients for nothing.
        with_gradients = grad_enabled and any(ctx.needs_input_grad)
        losses, *gradients = _losses_and_gradients(x, weight, targets, None, with_gradients)
        ctx.save_for_backward(x, weight, targets, *gradients)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, targets, dx, dw = ctx.saved_tensors
        # Equal weights are recognised by the stride: the gradient of a sum is one number, expanded to all targets. Comparing
        # numbers would wait for the GPU. Equal numbers that are stored one by one, as those of the gradient of losses.mean(),
        # are treated as unequal ones: slower, and as correct.
        if dloss.stride(0) == 0 or len(dloss) == 1:
            dx, dw = dx * dloss[0], dw * dloss[0]
        else:
            _, dx, dw = _losses_and_gradients(x, weight, targets, dloss, True)
        return dx.to(x.dtype), dw.to(weight.dtype), None, None


def _losses_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, dloss: Tensor | None, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their sum, weighted by dloss if given, with respect to x and weight (else undefined)."""
    w = weight.to(product_dtype(weight.dtype, weight.device))
    sum_dtype = torch.promote_types(w.dtype, torch.float32)
    inputs, block_rows = x.to(w.dtype), max(1, block_logits(x.is_cuda) // len(weight))
    losses = torch.empty(len(x), dtype=sum_dtype, device=x.device)
    dx, dw = torch.empty_like(inputs), torch.zeros(w.shape if with_gradients else 0, dtype=sum_dtype, device=w.device)
    # One buffer for all blocks: an allocator seldom reuses the memory of the last block for a new one of this size.
    buffer = torch.empty(min(block_rows, len(x)), len(weight), dtype=w.dtype, device=w.device)
    for i in range(0, len(x), block_rows):
        block = slice(i, i + block_rows)
        features, target_ids = inputs[block], targets[block, None]
        logits = torch.mm(features, w.T, out=buffer[: len(features)]).to(sum_dtype)
        target_logits = logits.gather(1, target_ids)
        row_max = logits.amax(1, keepdim=True)
        total = logits.sub_(row_max).exp_().sum(1, keepdim=True)
        losses[block] = (total.log() + row_max - target_logits)[:, 0]
        if not with_gradients:
            continue
        # softmax = exp / total. The factor of each row is applied to the (N, D) sides, which saves passes over the logits.
        logits.scatter_add_(1, target_ids, -total)
        row_factor = 1 / total if dloss is None else dloss[block, None] / total
        dlogits = logits.to(w.dtype)  # before row_factor
        dx[block] = (dlogits @ w).to(sum_dtype).mul_(row_factor).to(dx.dtype)
        scaled = (features.to(sum_dtype) * row_factor).to(w.dtype)
        if w.dtype == sum_dtype:
            dw.addmm_(dlogits.T, scaled)
        else:
            dw += dlogits.T @ scaled
    return losses, dx, dw
