"""The reader on a GPU, in Triton, which torch's builds for GPUs bring. Imported where there is one by reader, its caller.

One program reads one token; D passes in blocks of COLUMNS, so that a token's rows fit in registers whatever D is. A pass that
needs gelu(pre) makes it again: pre comes from the cache then. Sums are float32; padded rows and columns count as 0. Nothing
here waits for the device. Legend as in reader.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
CAPABILITY = (8, 0)  # the first NVIDIA devices with products of bfloat16 and of TF32
MOST_ROWS = 128  # above that, R x R weights do not fit in registers
TILE = 32  # columns of a block, at most: so many that the way back spills no registers


def jit(kernel: Callable[..., Any], **options: Any) -> Any:
    """triton.jit of the function itself, whatever tests wrapped around it. Any, since a call in a kernel is none in Python."""
    return triton.jit(inspect.unwrap(kernel), **options)


@jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))


@jit
def _slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.70710678118654752)) + x * 0.39894228040143268 * tl.exp(-0.5 * x * x)


@jit
def _place(d, stride, R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where columns d .. of R rows stand after the first element of the first, and which of them are real."""
    rows, columns = tl.arange(0, ROWS)[:, None], d + tl.arange(0, COLUMNS)[None, :]
    return rows * stride + columns, (rows < R) & (columns < D)


@jit
def _load(at, real):
    return tl.load(at, mask=real, other=0.0).to(tl.float32)


@jit
def _first(pre, n_chunks, R: tl.constexpr, D: tl.constexpr):
    """Of this program's token: its number in its chunk, its chunk, where its rows begin, and how far apart they are."""
    token = tl.program_id(0).to(tl.int64)  # products of it pass 2^31
    i, chunk = token // n_chunks, token % n_chunks
    stride = n_chunks.to(tl.int64) * D
    return i, chunk, pre + i * (3 * R) * stride + chunk * D, stride


@jit
def _weights(q, stride, R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """A = softmax(Q K^T) by rows; 0 in what is padded, though a real row be infinite."""
    scores = tl.zeros((ROWS, ROWS), tl.float32)
    for d in range(0, D, COLUMNS):
        at, real = _place(d, stride, R, D, ROWS, COLUMNS)
        queries, keys = _gelu(_load(q + at, real)), _gelu(_load(q + R * stride + at, real))
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    scores = tl.where(columns < R, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return tl.where((rows < R) & (columns < R), weights / tl.sum(weights, 1)[:, None], 0.0)


@partial(jit, do_not_specialize=["n_chunks", "n_tokens"])
def _read(
    pre, p, out, n_chunks, n_tokens,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, chunk, q, stride = _first(pre, n_chunks, R, D)
    row = tl.arange(0, ROWS)
    by = tl.load(p + row, mask=row < R, other=0.0)
    folded = tl.sum(by[:, None] * _weights(q, stride, R, D, ROWS, COLUMNS, PRECISION), 0)
    out += (chunk * n_tokens + i) * D
    for d in range(0, D, COLUMNS):
        at, real = _place(d, stride, R, D, ROWS, COLUMNS)
        values = _gelu(_load(q + 2 * R * stride + at, real))
        column = d + tl.arange(0, COLUMNS)
        tl.store(out + column, tl.sum(folded[:, None] * values, 0), mask=column < D)


@partial(jit, do_not_specialize=["n_chunks", "n_tokens"])
def _read_back(
    pre, p, dout, dp, n_chunks, n_tokens,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, chunk, q, stride = _first(pre, n_chunks, R, D)
    k, v = q + R * stride, q + 2 * R * stride
    row = tl.arange(0, ROWS)
    by = tl.load(p + row, mask=row < R, other=0.0)
    weights = _weights(q, stride, R, D, ROWS, COLUMNS, PRECISION)
    folded = tl.sum(by[:, None] * weights, 0)
    dout += (chunk * n_tokens + i) * D
    dweights = tl.zeros((ROWS,), tl.float32)  # of any row, before p
    for d in range(0, D, COLUMNS):
        at, real = _place(d, stride, R, D, ROWS, COLUMNS)
        column = d + tl.arange(0, COLUMNS)
        dweights += tl.sum(_gelu(_load(v + at, real)) * _load(dout + column, column < D)[None, :], 1)
    own = tl.sum(weights * dweights[None, :], 1)
    tl.store(dp + tl.program_id(0).to(tl.int64) * R + row, own, mask=row < R)
    dscores = by[:, None] * weights * (dweights[None, :] - own[:, None])
    for d in range(0, D, COLUMNS):
        at, real = _place(d, stride, R, D, ROWS, COLUMNS)
        column = d + tl.arange(0, COLUMNS)
        queries, keys, values = _load(q + at, real), _load(k + at, real), _load(v + at, real)
        dqueries = tl.dot(dscores, _gelu(keys), input_precision=PRECISION) * _slope(queries)
        dkeys = tl.dot(tl.trans(dscores), _gelu(queries), input_precision=PRECISION) * _slope(keys)
        dvalues = folded[:, None] * _load(dout + column, column < D)[None, :] * _slope(values)
        tl.debug_barrier()  # what is written over has been read by every warp
        tl.store(q + at, dqueries, mask=real)
        tl.store(k + at, dkeys, mask=real)
        tl.store(v + at, dvalues, mask=real)


def knobs(rows: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are compiled for. tl.dot wants 16 rows and columns at least; a thread holds some 8 elements of a tile.

    Products of bfloat16 readings run in TF32, whose rounding is an eighth of theirs; those of float32 in float32.
    """
    padded, columns = max(16, triton.next_power_of_2(rows)), min(TILE, max(16, triton.next_power_of_2(width)))
    return {
        "R": rows,
        "D": width,
        "ROWS": padded,
        "COLUMNS": columns,
        "PRECISION": "tf32" if dtype == torch.bfloat16 and torch.version.hip is None else "ieee",
        "num_warps": min(8, padded * columns // 256),
    }


def serves(dtype: torch.dtype, device: torch.device, rows: int) -> bool:
    """Whether this is the reader for such pre-activations on such a device."""
    able = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= CAPABILITY
    return able and dtype in DTYPES and rows <= MOST_ROWS


def read(pre: Tensor, p: Tensor, out: Tensor) -> None:
    """See reader.read."""
    n, chunk, width = out.shape
    with torch.cuda.device_of(pre):
        _read[(n * chunk,)](pre, p, out, n, chunk, **knobs(len(p), width, pre.dtype))


def read_back(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor) -> None:
    """See reader.read_back. Every token's d p is summed afterwards: in the same order always, as atomic sums are not."""
    n, chunk, width = dout.shape
    of_p = torch.empty(n * chunk, len(p), dtype=torch.float32, device=pre.device)
    with torch.cuda.device_of(pre):
        _read_back[(n * chunk,)](pre, p, dout, of_p, n, chunk, **knobs(len(p), width, pre.dtype))
    dp += of_p.sum(0)
