"""Timing and memory measurement for all sections of speed.py, and the section `ceilings` (peak speeds of this machine).

In each row of a section, measured values are floats, or None where a measurement failed. The conditions of the measurement are
strings or integers; speed.py matches the rows of two revisions by them.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

Row = dict[str, Any]
Run = Callable[[], Any]
K = TypeVar("K", bound=Hashable)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Section:
    """Results of a section: tables of rows, and notes such as what was left out and why."""

    tables: dict[str, list[Row]]
    notes: list[str] = field(default_factory=list)


def dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """DTYPES, without bfloat16 on a CPU for which oneDNN has no products of it: one takes 5 to 80 times as long there."""
    slow = device.type == "cpu" and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return {name: dtype for name, dtype in DTYPES.items() if not (slow and dtype == torch.bfloat16)}


def dtype_notes(device: torch.device) -> list[str]:
    """A note on each of DTYPES that is not measured on this device."""
    return [f"{name}: left out, this processor has no arithmetic for it" for name in DTYPES if name not in dtypes(device)]


def synchronized(device: torch.device) -> float:
    """The current time in seconds, after all queued work of the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Run, device: torch.device) -> float:
    """Seconds of one call of `run`."""
    began = synchronized(device)
    run()
    return synchronized(device) - began


def interleaved(runs: Mapping[K, Run], device: torch.device, repeats: int | Mapping[K, int]) -> dict[K, list[float]]:
    """Seconds of each call, in the order A B C A B C .., so that noise affects all runs alike. The caller warms up."""
    wanted = dict.fromkeys(runs, repeats) if isinstance(repeats, int) else repeats
    found: dict[K, list[float]] = {key: [] for key in runs}
    for i in range(max(wanted.values())):
        for key, run in runs.items():
            if i < wanted[key]:
                found[key].append(seconds(run, device))
    return found


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a / b over repeats."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def status_bytes(name: str) -> float:
    """VmRSS (resident memory) or VmHWM (its peak) of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return float(line.split()[1]) * 1024


def trim() -> None:
    """Returns free heap memory to the kernel, which the workers' malloc settings (MALLOC_SETTINGS) would keep."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(run: Run, device: torch.device) -> float | None:
    """Peak memory of `run` in bytes, in addition to what was allocated before. None if the kernel does not report it.

    On a CPU this is the process's high-water mark, which is reset first. Unlike torch's profiler it includes allocations inside
    libraries and our own kernel. A page counts when it is first touched, so free memory is returned to the kernel before.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    try:
        trim()
        before = status_bytes("VmRSS")
        CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    run()
    return max(0.0, status_bytes("VmHWM") - before)


def available_bytes(device: torch.device) -> float:
    """Free memory of the device in bytes; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return float("inf")


def exponent(tokens: Sequence[int], values: Sequence[float]) -> float:
    """Exponent k of the fit values ~ tokens^k, by least squares of logarithms."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def matmul_flops(dtype: torch.dtype, device: torch.device, quick: bool) -> float:
    """FLOP/s of a square matrix product, the best of several."""
    n = 512 if quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    (a @ b).sum()
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def copy_bytes(device: torch.device, quick: bool) -> float:
    """Bytes/s read and written by a copy larger than the caches, the best of several."""
    a = torch.ones((2**24 if quick else 2**28) * (4 if device.type == "cuda" else 1), dtype=torch.uint8, device=device)
    b = torch.empty_like(a).copy_(a)
    return 2 * a.numel() / min(seconds(lambda: b.copy_(a), device) for _ in range(8))


def ceilings(device: torch.device, quick: bool) -> Section:
    """Section `ceilings`: peak speed of matrix products and copies on this machine."""
    rows: list[Row] = [
        {"ceiling": f"matmul {name}", "flops_per_second": matmul_flops(dtype, device, quick), "bytes_per_second": None}
        for name, dtype in dtypes(device).items()
    ]
    rows.append({"ceiling": "copy", "flops_per_second": None, "bytes_per_second": copy_bytes(device, quick)})
    return Section({"ceilings": rows}, dtype_notes(device))
