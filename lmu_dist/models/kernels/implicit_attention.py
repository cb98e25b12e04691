"""Implicit self-attention over the memory rows of each token, forward and backward: in C++, in Triton or in plain torch.

Pre-activations come in the layout of a matrix product, (C K, N D): tokens of a chunk and rows of the projection vertically,
chunks and channels horizontally. Legend: N chunks, C tokens of a chunk, D width, R reduced order, K = 3R. Called by mixers/lmu:
mixer, chunked, and fourier (with chunks of one token).
"""

import logging
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lmu_dist.models.kernels import compiled

Implementation = Literal["c++", "triton", "torch"]


@cache
def implementation(dtype: torch.dtype, device: torch.device, rows: int = 1) -> Implementation:
    """Implementation for pre-activations of this precision and device with R = `rows`."""
    if compiled.is_available(dtype, device):
        return "c++"
    if device.type == "cuda" and (triton := _triton_kernels()) is not None and triton.is_supported(dtype, device, rows):
        return "triton"
    return "torch"


@cache
def _triton_kernels() -> ModuleType | None:
    """The module of GPU kernels; None if Triton is not installed, which is logged once."""
    try:
        from lmu_dist.models.kernels import triton_kernels
    except ImportError as e:
        logging.getLogger(__name__).warning("cannot import Triton for the LMU on a GPU, using plain torch instead: %s", e)
        return None
    return triton_kernels


def _kernels(pre: Tensor, p: Tensor) -> ModuleType | None:
    """The module whose `forward` and `backward` take these tensors; None: plain torch."""
    match implementation(pre.dtype, pre.device, len(p)):
        case "c++":
            return compiled
        case "triton":
            return _triton_kernels()
        case "torch":
            return None


def attend(pre: Tensor, p: Tensor, scale: float = 1.0) -> Tensor:
    """p softmax(scale Q K^T) V in plain torch, where gelu(pre) stacks Q, K and V: (.., K, D) -> (.., D)."""
    q, k, v = F.gelu(pre).chunk(3, dim=-2)
    weights = torch.softmax(scale * (q @ k.transpose(-1, -2)), dim=-1)
    return (p[None] @ weights @ v).squeeze(-2)


def forward(pre: Tensor, p: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """Writes the attention's output (N, C, D) into `out`, from pre-activations (C K, N D)."""
    _check_layout(pre, p, out)
    if (kernels := _kernels(pre, p)) is not None:
        kernels.forward(pre, p.float().contiguous(), out, scale)
    else:
        out.copy_(attend(_by_token(pre, out), p.to(pre.dtype), scale))


def backward(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor, scale: float = 1.0) -> None:
    """Overwrites `pre` with its gradient, given d out (N, C, D), and adds the gradient of p to `dp`."""
    _check_layout(pre, p, dout)
    if (kernels := _kernels(pre, p)) is not None:
        kernels.backward(pre, p.float().contiguous(), dout, dp, scale)
        return
    with torch.enable_grad():
        inputs, weights = _by_token(pre, dout).detach().requires_grad_(), p.to(pre.dtype).detach().requires_grad_()
        dinputs, dweights = torch.autograd.grad(attend(inputs, weights, scale), (inputs, weights), dout)
    _by_token(pre, dout).copy_(dinputs)
    dp += dweights


def overwritable(pre: Tensor) -> Tensor:
    """Saved pre-activations that `backward` may overwrite: a copy if the graph is kept, for another backward pass."""
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
    return pre.clone() if kept else pre


def _check_layout(pre: Tensor, p: Tensor, out: Tensor) -> None:
    """Asserts what the compiled kernels rely on and cannot check, since they get addresses only."""
    n, chunk, width = out.shape
    assert pre.shape == (chunk * 3 * len(p), n * width), "pre and out differ in shape"
    assert pre.is_contiguous(), "pre is not contiguous"
    assert out.is_contiguous(), "out is not contiguous"
    assert pre.dtype == out.dtype, "pre and out differ in precision"


def _by_token(pre: Tensor, out: Tensor) -> Tensor:
    """View (N, C, K, D) of the pre-activations."""
    n, chunk, width = out.shape
    return pre.view(chunk, -1, n, width).permute(2, 0, 1, 3)
