"""Implicit self-attention on a GPU, in Triton, which torch's GPU builds install. Called by implicit_attention.

One program computes one token. It passes over D in blocks of COLUMNS, so that a block of all rows fits in registers for any D.
A pass that needs gelu(pre) computes it again, from pre-activations that are then in the cache. Sums are float32. Padded rows
and columns count as 0. No function synchronizes with the device. Legend as in implicit_attention.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from lmu_dist.models.precision import is_hopper

DTYPES = (torch.float32, torch.bfloat16)
MIN_CAPABILITY = (8, 0)  # the first NVIDIA devices with products of bfloat16 and of TF32
MAX_ROWS = 128  # above that, R x R weights do not fit in registers
MAX_COLUMNS = 32  # of a block: the backward kernel spills registers above that


def jit(kernel: Callable[..., Any], **options: Any) -> Any:
    """triton.jit of the undecorated function, since the tests' type checker wraps every function of the package.

    Returns Any: a call inside a kernel is not a Python call.
    """
    return triton.jit(inspect.unwrap(kernel), **options)


@jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))


@jit
def _gelu_derivative(x):
    return 0.5 * (1.0 + tl.erf(x * 0.70710678118654752)) + x * 0.39894228040143268 * tl.exp(-0.5 * x * x)


@jit
def _block_offsets(d, stride, R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of columns d .. d + COLUMNS of all rows from the first row's first element, and the mask of real elements."""
    rows, columns = tl.arange(0, ROWS)[:, None], d + tl.arange(0, COLUMNS)[None, :]
    return rows * stride + columns, (rows < R) & (columns < D)


@jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@jit
def _locate_token(pre, n_chunks, R: tl.constexpr, D: tl.constexpr):
    """Of this program's token: its index in its chunk, its chunk, the pointer to its first row, and the stride of its rows."""
    token = tl.program_id(0).to(tl.int64)  # offsets computed from it exceed 2^31
    i, chunk = token // n_chunks, token % n_chunks
    stride = n_chunks.to(tl.int64) * D
    return i, chunk, pre + i * (3 * R) * stride + chunk * D, stride


@jit
def _attention_weights(
    q, stride, scale,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A = softmax(scale Q K^T) by rows; 0 in the padding, even if a row holds infinities."""
    scores = tl.zeros((ROWS, ROWS), tl.float32)
    for d in range(0, D, COLUMNS):
        offsets, mask = _block_offsets(d, stride, R, D, ROWS, COLUMNS)
        queries, keys = _gelu(_load(q + offsets, mask)), _gelu(_load(q + R * stride + offsets, mask))
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    scores = tl.where(columns < R, scores * scale, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return tl.where((rows < R) & (columns < R), weights / tl.sum(weights, 1)[:, None], 0.0)


@partial(jit, do_not_specialize=["n_chunks", "n_tokens"])
def _forward(
    pre, p, out, n_chunks, n_tokens, scale,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, chunk, q, stride = _locate_token(pre, n_chunks, R, D)
    row = tl.arange(0, ROWS)
    p_rows = tl.load(p + row, mask=row < R, other=0.0)
    p_weights = tl.sum(p_rows[:, None] * _attention_weights(q, stride, scale, R, D, ROWS, COLUMNS, PRECISION), 0)  # p A
    out += (chunk * n_tokens + i) * D
    for d in range(0, D, COLUMNS):
        offsets, mask = _block_offsets(d, stride, R, D, ROWS, COLUMNS)
        values = _gelu(_load(q + 2 * R * stride + offsets, mask))
        column = d + tl.arange(0, COLUMNS)
        tl.store(out + column, tl.sum(p_weights[:, None] * values, 0), mask=column < D)


@partial(jit, do_not_specialize=["n_chunks", "n_tokens"])
def _backward(
    pre, p, dout, dp, n_chunks, n_tokens, scale,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, chunk, q, stride = _locate_token(pre, n_chunks, R, D)
    k, v = q + R * stride, q + 2 * R * stride
    row = tl.arange(0, ROWS)
    p_rows = tl.load(p + row, mask=row < R, other=0.0)
    weights = _attention_weights(q, stride, scale, R, D, ROWS, COLUMNS, PRECISION)
    p_weights = tl.sum(p_rows[:, None] * weights, 0)
    dout += (chunk * n_tokens + i) * D
    dweights = tl.zeros((ROWS,), tl.float32)  # V d out: d A is the outer product of p and this
    for d in range(0, D, COLUMNS):
        offsets, mask = _block_offsets(d, stride, R, D, ROWS, COLUMNS)
        column = d + tl.arange(0, COLUMNS)
        dweights += tl.sum(_gelu(_load(v + offsets, mask)) * _load(dout + column, column < D)[None, :], 1)
    dp_rows = tl.sum(weights * dweights[None, :], 1)
    tl.store(dp + tl.program_id(0).to(tl.int64) * R + row, dp_rows, mask=row < R)
    dscores = scale * p_rows[:, None] * weights * (dweights[None, :] - dp_rows[:, None])
    for d in range(0, D, COLUMNS):
        offsets, mask = _block_offsets(d, stride, R, D, ROWS, COLUMNS)
        column = d + tl.arange(0, COLUMNS)
        queries, keys, values = _load(q + offsets, mask), _load(k + offsets, mask), _load(v + offsets, mask)
        dqueries = tl.dot(dscores, _gelu(keys), input_precision=PRECISION) * _gelu_derivative(queries)
        dkeys = tl.dot(tl.trans(dscores), _gelu(queries), input_precision=PRECISION) * _gelu_derivative(keys)
        dvalues = p_weights[:, None] * _load(dout + column, column < D)[None, :] * _gelu_derivative(values)
        tl.debug_barrier()  # every warp has loaded what the stores below overwrite
        tl.store(q + offsets, dqueries, mask=mask)
        tl.store(k + offsets, dkeys, mask=mask)
        tl.store(v + offsets, dvalues, mask=mask)


def launch_config(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Compile-time constants and number of warps of both kernels.

    tl.dot needs at least 16 rows and columns. A thread holds about 8 elements of a block. Products of bfloat16 inputs run in
    TF32, whose rounding error is an eighth of bfloat16's, and those of float32 inputs in float32.

    On Hopper products of 64 rows and more run in float32 too. In TF32 they become instructions of warp groups, and Triton up to
    3.7.0 is known to compile a transposed product as their operand, as in the backward kernel, to code with wrong results
    (github.com/fla-org/flash-linear-attention, issue 640).
    """
    padded, columns = max(16, triton.next_power_of_2(rows)), min(MAX_COLUMNS, max(16, triton.next_power_of_2(width)))
    tf32 = dtype == torch.bfloat16 and torch.version.hip is None and not (padded >= 64 and is_hopper(device))
    return {
        "R": rows,
        "D": width,
        "ROWS": padded,
        "COLUMNS": columns,
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": min(8, padded * columns // 256),
    }


def is_supported(dtype: torch.dtype, device: torch.device, rows: int) -> bool:
    """Whether these kernels take pre-activations of this precision and device with R = `rows`."""
    capable = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    return capable and dtype in DTYPES and rows <= MAX_ROWS


def forward(pre: Tensor, p: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """See implicit_attention.forward."""
    n, chunk, width = out.shape
    with torch.cuda.device_of(pre):
        _forward[(n * chunk,)](pre, p, out, n, chunk, scale, **launch_config(len(p), width, pre.dtype, pre.device))


def backward(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor, scale: float = 1.0) -> None:
    """See implicit_attention.backward. The d p of all tokens are stored, then summed in a fixed order, unlike atomics."""
    n, chunk, width = dout.shape
    dp_tokens = torch.empty(n * chunk, len(p), dtype=torch.float32, device=pre.device)
    with torch.cuda.device_of(pre):
        _backward[(n * chunk,)](pre, p, dout, dp_tokens, n, chunk, scale, **launch_config(len(p), width, pre.dtype, pre.device))
    dp += dp_tokens.sum(0)
