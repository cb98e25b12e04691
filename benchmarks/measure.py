"""Time, memory and ceilings of this machine, for all sections of speed.py: a function to run in, numbers out.

What was measured is a float in every row of a section, what it was measured on is a string or an integer, and None is what
could not be measured; speed.py tells rows of two revisions apart by that.
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
    """What a section found: tables of rows, and what else is to be said: what it left out, and why."""

    tables: dict[str, list[Row]]
    notes: list[str] = field(default_factory=list)


def synchronized(device: torch.device) -> float:
    """The time, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Run, device: torch.device) -> float:
    """Of one call."""
    began = synchronized(device)
    run()
    return synchronized(device) - began


def interleaved(runs: Mapping[K, Run], device: torch.device, repeats: int | Mapping[K, int]) -> dict[K, list[float]]:
    """Seconds of every call, A B C A B C .., so that all meet the same noise. The caller has warmed up."""
    wanted = dict.fromkeys(runs, repeats) if isinstance(repeats, int) else repeats
    found: dict[K, list[float]] = {key: [] for key in runs}
    for i in range(max(wanted.values())):
        for key, run in runs.items():
            if i < wanted[key]:
                found[key].append(seconds(run, device))
    return found


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over repeats of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def status_bytes(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return float(line.split()[1]) * 1024


def trim() -> None:
    """Gives what is free back to the kernel; workers' settings of malloc (KEEP_MEMORY) keep it otherwise."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(run: Run, device: torch.device) -> float | None:
    """The most memory that `run` needs beside what was there before. None where the kernel does not tell.

    On a CPU the high-water mark of the process, set back first: unlike torch's profiler it also sees what libraries and our own
    kernel allocate for themselves. Pages count when they are touched, so memory is given back before.
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
    """Memory that a measurement may plan with."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return float("inf")


def exponent(tokens: Sequence[int], values: Sequence[float]) -> float:
    """k of values ~ tokens^k, by least squares of logarithms."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def matmul_flops(dtype: torch.dtype, device: torch.device, quick: bool) -> float:
    """Most FLOP/s of a square product, of several."""
    n = 512 if quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    (a @ b).sum()
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def copy_bytes(device: torch.device, quick: bool) -> float:
    """Most bytes/s read and written by a copy too large for caches."""
    a = torch.ones((2**24 if quick else 2**28) * (4 if device.type == "cuda" else 1), dtype=torch.uint8, device=device)
    b = torch.empty_like(a).copy_(a)
    return 2 * a.numel() / min(seconds(lambda: b.copy_(a), device) for _ in range(8))


def ceilings(device: torch.device, quick: bool) -> Section:
    """Section `ceilings`: what products and copies reach here, whatever the model."""
    rows: list[Row] = [
        {"ceiling": f"matmul {name}", "flops_per_second": matmul_flops(dtype, device, quick), "bytes_per_second": None}
        for name, dtype in DTYPES.items()
    ]
    rows.append({"ceiling": "copy", "flops_per_second": None, "bytes_per_second": copy_bytes(device, quick)})
    return Section({"ceilings": rows})
