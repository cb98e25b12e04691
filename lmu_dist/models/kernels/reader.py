"""What implicit attention reads of a block of tokens, and the way back: compiled from reader.cpp, or the same in plain torch.

Pre-activations come as a product leaves them, (C K, N D): tokens of a chunk and readings down, chunks and channels across.
Legend: N chunks, C tokens of a chunk, D width, R reduced order, K = 3R. Called by chunked.
"""

import ctypes
import logging
import os
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("reader.cpp")
FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-mprefer-vector-width=512")
# By what torch has found the processor to be capable of, not by the processor itself: nodes may share a cache of builds.
LEVELS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
COMPILED = (torch.float32, torch.bfloat16)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled reader, built at first use (some five seconds); None where it cannot be, which is logged once."""
    capability = torch.backends.cpu.get_cpu_capability()
    path = os.environ.get("PATH", "")
    # ninja stands beside the interpreter, and need not be on PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    flags = [*FLAGS, *([LEVELS[capability]] if capability in LEVELS else [])]
    try:
        built = cpp_extension.load(
            f"lmu_reader_{capability.lower()}", [str(SOURCE)], extra_cflags=flags, is_python_module=False
        )
        return ctypes.CDLL(built)
    except (OSError, RuntimeError) as e:
        logging.getLogger(__name__).warning("no compiled LMU reader, plain torch in its place: %s", str(e).splitlines()[0])
        return None
    finally:
        os.environ["PATH"] = path


def compiled(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled form is there for tensors like these."""
    return device.type == "cpu" and dtype in COMPILED and library() is not None


def attend(pre: Tensor, p: Tensor, scale: float = 1.0) -> Tensor:
    """p softmax(scale Q K^T) V with Q, K, V = gelu(pre) one after the other, (.., K, D) -> (.., D)."""
    q, k, v = F.gelu(pre).chunk(3, dim=-2)
    weights = torch.softmax(scale * (q @ k.transpose(-1, -2)), dim=-1)
    return (p[None] @ weights @ v).squeeze(-2)


def read(pre: Tensor, p: Tensor, out: Tensor) -> None:
    """pre (C K, N D) -> out (N, C, D)."""
    if compiled(pre.dtype, pre.device):
        _call("lmu_read", pre, p.float(), out)
    else:
        out.copy_(attend(_by_token(pre, out), p.to(pre.dtype)))


def read_back(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor) -> None:
    """From d out (N, C, D) to d pre, in the place of pre; d p is added to dp."""
    if compiled(pre.dtype, pre.device):
        _call("lmu_read_back", pre, p.float(), dout, dp)
        return
    with torch.enable_grad():
        inputs, weights = _by_token(pre, dout).detach().requires_grad_(), p.to(pre.dtype).detach().requires_grad_()
        dpre, of_p = torch.autograd.grad(attend(inputs, weights), (inputs, weights), dout)
    _by_token(pre, dout).copy_(dpre)
    dp += of_p


def _by_token(pre: Tensor, out: Tensor) -> Tensor:
    n, chunk, width = out.shape
    return pre.view(chunk, -1, n, width).permute(2, 0, 1, 3)


def _call(name: str, pre: Tensor, p: Tensor, token: Tensor, *more: Tensor) -> None:
    (n, chunk, width), made = token.shape, library()
    assert made is not None
    assert pre.is_contiguous()
    assert token.is_contiguous()
    assert pre.dtype == token.dtype
    function = getattr(made, f"{name}_{str(pre.dtype).removeprefix('torch.')}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (pre, p, token, *more)]
    function(*map(ctypes.c_int64, (n, chunk, len(p), width)), *pointers)
