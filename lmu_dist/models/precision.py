"""Precision of the matrix products in blocked operators: the model's, except where the device computes them slowly."""

from functools import cache

import torch


@cache
def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """float32 for bfloat16 on CPUs without AMX tiles, where bfloat16 products are slower than float32 ones; else `dtype`."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.float32
    return dtype
