"""The frozen Legendre memory in float64 numpy: state-space matrices, impulse response and row scale of an order and a window.

Everything is computed on the CPU and cast last; nothing is trained. A process computes a memory once. Large memories are also
kept in the user's cache folder (`CACHE`), because at order 1,000 they take most of a second, which every worker would spend.
Called by mixer, chunked and fourier. Callers must not modify the arrays.
"""

import math
import os
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch

from lmu_dist.array_types import Float

ALGORITHM = 2  # version of what is kept on disk. Raise it with every change of a result
CACHE = "legendre"  # in the user's cache folder; may be deleted at any time
SMALLEST_ORDER_ON_DISK = 300  # below, computing takes about as long as reading
LONGEST_BLOCK = 4096  # tokens of the impulse response that are computed at once
FORGOTTEN = 1e-9  # share of an impulse response that counts as nothing, far below float32's rounding


@dataclass(frozen=True)
class LegendreMemory:
    """Constants of one memory.

    a_bar          (Q, Q) and b_bar (Q,): the recurrence m_t = a_bar m_(t-1) + b_bar x_t
    response       (Q, W), the first W columns of the impulse response: a power of two, at least one window or LONGEST_BLOCK
    row_scale      (Q,), see `row_scale`
    memory_tokens  see `memory_tokens`
    """

    a_bar: Float[np.ndarray, "Q Q"]
    b_bar: Float[np.ndarray, "Q"]
    response: Float[np.ndarray, "Q W"]
    row_scale: Float[np.ndarray, "Q"]
    memory_tokens: int


def continuous_matrices(order: int, theta_tokens: float) -> tuple[Float[np.ndarray, "Q Q"], Float[np.ndarray, "Q"]]:
    """State-space matrices A (Q, Q) and B (Q,) of the sliding window, per token of time (Voelker et al. 2019, eq. 2-3)."""
    i = np.arange(order)
    scale = (2.0 * i + 1.0) / theta_tokens
    sign = np.where(i[:, None] < i[None, :], -1.0, (-1.0) ** (i[:, None] - i[None, :] + 1))
    return scale[:, None] * sign, scale * (-1.0) ** i


def discrete_matrices(order: int, theta_tokens: float) -> tuple[Float[np.ndarray, "Q Q"], Float[np.ndarray, "Q"]]:
    """Zero-order hold with a step of one token: Abar = e^A (Q, Q), Bbar = A^-1 (e^A - I) B (Q,)."""
    memory = legendre_memory(order, theta_tokens)
    return memory.a_bar, memory.b_bar


def impulse_response(order: int, theta_tokens: float, length: int) -> Float[np.ndarray, "Q T"]:
    """H = [Bbar, Abar Bbar, Abar^2 Bbar, ...] (Q, length), by doubling: log2(length) matrix products."""
    h = legendre_memory(order, theta_tokens).response
    while h.shape[1] < length:
        power = np.linalg.matrix_power(discrete_matrices(order, theta_tokens)[0], h.shape[1])
        h = np.concatenate([h, power @ h], axis=1)
    return h[:, :length]


def memory_tokens(order: int, theta_tokens: float) -> int:
    """Number of tokens after which the memory has forgotten an input.

    What is left of it is then below 1e-9 of all it contributes. The result is about two windows for high orders and about
    twenty for order 1.
    """
    return legendre_memory(order, theta_tokens).memory_tokens


def row_scale(order: int, theta_tokens: float) -> Float[np.ndarray, "Q"]:
    """Standard deviation of each memory row under white noise of unit variance (Q,): the root of the Gramian's diagonal.

    It is about sqrt((2i+1)/theta) for low orders i and less for orders that oscillate faster than tokens arrive. Memory rows
    divided by it have equal variance. In this basis projections are trained and recurrences run in float32.
    """
    return legendre_memory(order, theta_tokens).row_scale


def chunk_powers(
    order: int, theta_tokens: float, chunk: int, dtype: str
) -> tuple[Float[np.ndarray, "S Q Q"], Float[np.ndarray, "G Q Q"], Float[np.ndarray, "Q Q"]]:
    """Powers of Abar in units of the row scale: Abar .. Abar^S; Abar^S, Abar^2S .. below Abar^C; and Abar^C.

    S is about sqrt(C), so that products of one of the first and one of the second are all powers up to Abar^C, which would take
    gigabytes at high orders. Only Abar^C is float64 whatever the `dtype` ("f4" or "f8").
    """
    n_first = 2 ** math.ceil(math.log2(chunk) / 2)
    n_steps = -(-chunk // n_first) - 1

    def compute() -> list[np.ndarray]:
        scale = row_scale(order, theta_tokens)
        a_bar = discrete_matrices(order, theta_tokens)[0] / scale[:, None] * scale
        first, steps = [a_bar], list[np.ndarray]()
        for _ in range(n_first - 1):
            first.append(first[-1] @ a_bar)
        for _ in range(n_steps):
            steps.append(steps[-1] @ first[-1] if steps else first[-1])
        a_pow_chunk = first[chunk - len(steps) * n_first - 1]  # the rest after the last step
        a_pow_chunk = steps[-1] @ a_pow_chunk if steps else a_pow_chunk
        return [np.array(first, dtype), np.array(steps, dtype).reshape(-1, order, order), a_pow_chunk]

    shapes = [(n_first, order, order), (n_steps, order, order), (order, order)]
    name = f"chunk{chunk}-{dtype}"
    first, steps, a_pow_chunk = _from_disk_or(compute, shapes, [dtype, dtype, "f8"], order, theta_tokens, name)
    return first, steps, a_pow_chunk


@lru_cache(maxsize=32)
def legendre_memory(order: int, theta_tokens: float) -> LegendreMemory:
    """The memory of an order and a window, computed or read from the cache folder."""
    width = 2 ** math.ceil(math.log2(max(1, min(theta_tokens, LONGEST_BLOCK))))
    shapes = [(order, order), (order,), (order, width), (order,), (1,)]
    arrays = _from_disk_or(
        lambda: _compute_memory(order, theta_tokens, width), shapes, ["f8"] * 5, order, theta_tokens, "memory"
    )
    return LegendreMemory(*arrays[:4], memory_tokens=int(arrays[4][0]))


def _compute_memory(order: int, theta_tokens: float, width: int) -> list[np.ndarray]:
    a, b = continuous_matrices(order, theta_tokens)
    # Abar and Bbar are blocks of one matrix exponential, which needs no inverse of A.
    augmented = np.zeros((order + 1, order + 1))
    augmented[:order, :order], augmented[:order, order] = a, b
    exponential = torch.linalg.matrix_exp(torch.from_numpy(augmented)).numpy()
    a_bar, b_bar = np.ascontiguousarray(exponential[:order, :order]), np.ascontiguousarray(exponential[:order, order])
    # A power of Abar takes the response from one block of tokens to the next.
    response, power, step, step_power = b_bar[:, None], a_bar, 1, a_bar
    while response.shape[1] < width:
        response, power = np.concatenate([response, power @ response], axis=1), power @ power
        if response.shape[1] <= theta_tokens / 8:
            step, step_power = response.shape[1], power
    scale = _row_scale(response, power)
    tokens = _memory_tokens(step_power @ b_bar, step_power, scale, step, theta_tokens)
    return [a_bar, b_bar, response, scale, np.array([float(tokens)])]


def _row_scale(response: Float[np.ndarray, "Q W"], power: Float[np.ndarray, "Q Q"]) -> Float[np.ndarray, "Q"]:
    """Root of the sum of squares of the whole impulse response, of which `response` is the first block."""
    block, variance = response, np.square(response).sum(1)
    # A row of an order far above theta is a linear combination of the others. Rounding must not make its variance 0.
    while np.sum(np.square(block).sum(1) / np.maximum(variance, 1e-12)) > FORGOTTEN**2 * len(block):
        block = power @ block
        variance += np.square(block).sum(1)
    return np.sqrt(np.maximum(variance, 1e-12))


def _memory_tokens(
    response: Float[np.ndarray, "Q"], power: Float[np.ndarray, "Q Q"], scale: Float[np.ndarray, "Q"], step: int, theta: float
) -> int:
    """`memory_tokens` in multiples of `step`. `response` is the response after that many tokens, and `power` Abar^step."""
    tokens = step
    # In units of the row scale, the squared norm of the whole impulse response is its number of rows.
    while np.linalg.norm(response / scale) * np.sqrt(theta) > FORGOTTEN * np.sqrt(len(response)):
        response, tokens = power @ response, tokens + step
    return tokens


def _from_disk_or(
    compute: Callable[[], list[np.ndarray]],
    shapes: list[tuple[int, ...]],
    dtypes: list[str],
    order: int,
    theta_tokens: float,
    name: str,
) -> list[np.ndarray]:
    """Arrays of these shapes and types from the cache folder if they are there, else computed and written there.

    Processes of many machines may do this at once: a file appears complete, and its name determines its content. A damaged file
    (its last bytes are a checksum), a full disk and a read-only folder are not errors: the arrays are computed. Nothing is
    cached for small orders.
    """
    folder = _cache_folder() if order >= SMALLEST_ORDER_ON_DISK else None
    if folder is None:
        return compute()
    path = folder / f"order{order}-theta{theta_tokens:.17g}-{name}-v{ALGORITHM}.bin"
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    with suppress(OSError):
        *parts, checksum = np.split(np.fromfile(path, np.uint8), np.cumsum(sizes))
        if checksum.tobytes() == _checksum(parts):
            return [part.view(dtype).reshape(shape) for part, dtype, shape in zip(parts, dtypes, shapes, strict=True)]
    arrays = compute()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f"{path.stem}-", suffix=".partial", delete=False) as file:
            try:
                for array in arrays:
                    array.tofile(file)
                file.write(_checksum(arrays))
                file.close()
                os.replace(file.name, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(file.name)
                raise
    return arrays


def _cache_folder() -> Path | None:
    """The folder of the cache; None where platformdirs is not installed, which finds it."""
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return None
    return user_cache_path("lmu-dist") / CACHE


def _checksum(arrays: list[np.ndarray]) -> bytes:
    """CRC-32 of the arrays' bytes, in the byte order of the machine: another machine computes the arrays itself."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array.data, crc)
    return crc.to_bytes(4, sys.byteorder)
