"""Precision of the matrix products in blocked operators: the model's, except where the device computes them slowly."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch


@cache
def has_bfloat16_products() -> bool:
    """Whether this processor multiplies matrices of bfloat16 itself; where it does not, they are slower than those of float32.

    With AVX-512 oneDNN imitates them, at 1.3 to 2.2 times the time of float32 (layers of 128 to 512 channels, LOG.md); without
    it torch computes them in plain loops, at 5 to 80 times, most in the backward pass. There models/products converts operands.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    found = torch.cpu.get_capabilities()
    return found.get("architecture") != "x86_64" or any(map(found.get, ("amx_bf16", "avx512_bf16", "avx_ne_convert")))


@cache
def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """float32 for bfloat16 on CPUs without AMX tiles, where bfloat16 products are slower than float32 ones; else `dtype`."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.float32
    return dtype


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU of compute capability 9 (H100, H200), for which Triton compiles some kernels wrongly."""
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    return on_nvidia and torch.cuda.get_device_capability(device)[0] == 9


def recurrence_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of a recurrence under activations of `dtype`: float64 for float64, else float32, since rounding accumulates."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off for operators that choose the precision of each product themselves."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()
