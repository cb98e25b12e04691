"""In which precision matrix products of blocked operators run: the model's, where the device is fast at it."""

from functools import cache

import torch


@cache
def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """float32 for bfloat16 on processors without tiles for it, where products of bfloat16 take longer than of float32."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.float32
    return dtype
