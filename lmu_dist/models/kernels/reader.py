"""What implicit attention reads of a block of tokens, and the way back: in C++, in Triton, or the same in plain torch.

Pre-activations come as a product leaves them, (C K, N D): tokens of a chunk and readings down, chunks and channels across.
Legend: N chunks, C tokens of a chunk, D width, R reduced order, K = 3R. Called by chunked, transforms
(chunks of one token) and lmu.
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
    """Which one reads pre-activations like these, with R rows of queries: for the record of a run as well."""
    if device.type == "cpu" and dtype in compiled.DTYPES and compiled.library() is not None:
        return "c++"
    if device.type == "cuda" and (triton := _triton()) is not None and triton.serves(dtype, device, rows):
        return "triton"
    return "torch"


@cache
def _triton() -> ModuleType | None:
    """The kernels for GPUs; None where torch came without Triton, which is logged once."""
    try:
        from lmu_dist.models.kernels import device
    except ImportError as e:
        logging.getLogger(__name__).warning("no LMU reader for the GPU, plain torch in its place: %s", e)
        return None
    return device


def _made(pre: Tensor, p: Tensor) -> ModuleType | None:
    match implementation(pre.dtype, pre.device, len(p)):
        case "c++":
            return compiled
        case "triton":
            return _triton()
        case "torch":
            return None


def attend(pre: Tensor, p: Tensor, scale: float = 1.0) -> Tensor:
    """p softmax(scale Q K^T) V with Q, K, V = gelu(pre) one after the other, (.., K, D) -> (.., D)."""
    q, k, v = F.gelu(pre).chunk(3, dim=-2)
    weights = torch.softmax(scale * (q @ k.transpose(-1, -2)), dim=-1)
    return (p[None] @ weights @ v).squeeze(-2)


def read(pre: Tensor, p: Tensor, out: Tensor) -> None:
    """pre (C K, N D) -> out (N, C, D)."""
    _check(pre, p, out)
    if (made := _made(pre, p)) is not None:
        made.read(pre, p.float().contiguous(), out)
    else:
        out.copy_(attend(_by_token(pre, out), p.to(pre.dtype)))


def read_back(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor) -> None:
    """From d out (N, C, D) to d pre, in the place of pre; d p is added to dp."""
    _check(pre, p, dout)
    if (made := _made(pre, p)) is not None:
        made.read_back(pre, p.float().contiguous(), dout, dp)
        return
    with torch.enable_grad():
        inputs, weights = _by_token(pre, dout).detach().requires_grad_(), p.to(pre.dtype).detach().requires_grad_()
        dpre, of_p = torch.autograd.grad(attend(inputs, weights), (inputs, weights), dout)
    _by_token(pre, dout).copy_(dpre)
    dp += of_p


def _check(pre: Tensor, p: Tensor, token: Tensor) -> None:
    """What compiled readers take for granted, who see addresses only."""
    n, chunk, width = token.shape
    assert pre.shape == (chunk * 3 * len(p), n * width), "pre and out differ in shape"
    assert pre.is_contiguous(), "pre has gaps"
    assert token.is_contiguous(), "out has gaps"
    assert pre.dtype == token.dtype, "pre and out differ in precision"


def _by_token(pre: Tensor, out: Tensor) -> Tensor:
    n, chunk, width = out.shape
    return pre.view(chunk, -1, n, width).permute(2, 0, 1, 3)
