"""Part `card`: the machine, its software, and the peak speed of its matrix products and copies."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from measure import DTYPES, copy_bytes, matmul_flops

from gpu.recorder import Recorder

PACKAGES = ("torch", "triton", "numpy", "scipy", "ray", "deepspeed", "mlflow", "datasets", "pydantic", "transformers", "pytest")


def run(recorder: Recorder) -> None:
    """Records the facts, then measures the peaks."""
    for name, value in facts(recorder.device).items():
        recorder.fact(name, value)
    for name, dtype in DTYPES.items():
        recorder.row("peaks", peak=f"matmul {name}", flops_per_second=matmul_flops(dtype, recorder.device, recorder.toy))
    recorder.row("peaks", peak="copy, read and written", bytes_per_second=copy_bytes(recorder.device, recorder.toy))


def facts(device: torch.device) -> dict[str, object]:
    """Name, memory and driver of the card, and versions of the software; None for a package that is not installed."""
    found: dict[str, object] = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "processor": _processor(),
        "driver": _driver(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "memory_bytes": properties.total_memory}
        found |= {"multiprocessors": properties.multi_processor_count}
    else:
        found["card"] = "cpu"
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
