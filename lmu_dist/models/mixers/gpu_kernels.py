"""Adapters to the Triton kernels of fla-core (extra `gpu`) for Gated DeltaNet and Mamba-2 on a GPU.

Called by mixers/gated_deltanet and mixers/mamba2, and by their families for the name in the record. Tests call them with plain
torch in place of the kernels, with the layouts and arguments that fla-core 0.6.0 documents. We have not run them on a GPU yet:
compare a run with the plain form first (uninstall fla-core) if results matter.
"""

import importlib
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from lmu_dist.array_types import Float
from lmu_dist.models.precision import is_hopper

LARGEST_KEY_WIDTH = 256  # fla/ops/common/chunk_delta_h.py refuses wider keys
HOPPER_TRITON = "3.7.1"  # below it Triton compiles the backward kernels wrongly there, and fla/ops/common/chunk_o.py raises


@cache
def _fla(operator: str) -> Any:
    """The function `chunk_OPERATOR` of fla-core; None if it is not installed or cannot be imported, which is logged once."""
    try:
        return getattr(importlib.import_module(f"fla.ops.{operator}"), f"chunk_{operator}")
    except (ImportError, AttributeError, RuntimeError) as e:
        fix = "; install the extra gpu (docs/families.md)" if isinstance(e, ModuleNotFoundError) and e.name == "fla" else ""
        logging.getLogger(__name__).warning("cannot import fla-core, using plain torch instead, which is slower: %s%s", e, fix)
        return None


@cache
def _compiles_on(device: torch.device) -> bool:
    """Whether Triton compiles the kernels correctly for this GPU. If not, a warning is logged once."""
    if not is_hopper(device) or (triton := TorchVersion(importlib.import_module("triton").__version__)) >= HOPPER_TRITON:
        return True
    logging.getLogger(__name__).warning(
        "fla-core refuses Triton %s on this GPU, using plain torch instead, which is slower; Triton %s comes with torch 2.13",
        triton,
        HOPPER_TRITON,
    )
    return False


def is_supported(operator: str, dtype: torch.dtype, device: torch.device, key_width: int) -> bool:
    """Whether the kernels of an operator, gated_delta_rule or simple_gla, take keys of this width on this device.

    Only in half precision: of float32 inputs they multiply 10 bits (TF32), which nobody expects of float32.
    """
    if dtype not in (torch.bfloat16, torch.float16) or device.type != "cuda" or key_width > LARGEST_KEY_WIDTH:
        return False
    return _fla(operator) is not None and _compiles_on(device)


def operator_name(operator: str, dtype: torch.dtype, device: torch.device, key_width: int) -> str:
    """Name of the implementation that runs, for the record."""
    return f"fla-core: {operator}" if is_supported(operator, dtype, device, key_width) else "chunked"


def gated_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    dtype: torch.dtype,
) -> Float[Tensor, "B T H V"]:
    """What mixers/gated_delta_rule.chunked computes from an empty state, with q, k, v and outputs in `dtype`.

    The kernels divide q and k by their norms and q by sqrt(K); g and beta stay float32.
    """
    inputs = (x.to(dtype).contiguous() for x in (q, k, v))
    q, k, v = inputs
    out, _ = _fla("gated_delta_rule")(q=q, k=k, v=v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
    return out.float()


def state_space(
    x: Float[Tensor, "B T H P"],
    dt: Float[Tensor, "B T H"],
    rates: Float[Tensor, "H"],
    b: Float[Tensor, "B T G N"],
    c: Float[Tensor, "B T G N"],
    skip: Float[Tensor, "H"],
    dtype: torch.dtype,
) -> Float[Tensor, "B T H P"]:
    """What mixers/ssd.chunked computes from an empty state: linear attention with a decay for every head (simple GLA).

    Queries are C, keys B, both of every head, and values dt x; the kernels' scale is 1. Products are in `dtype`.
    """
    q, k = (t.repeat_interleave(x.shape[2] // t.shape[2], 2).to(dtype) for t in (c, b))
    v = (x * dt[..., None]).to(dtype)
    out, _ = _fla("simple_gla")(q=q, k=k, v=v, g=dt * rates, scale=1.0)
    return out.float() + x * skip[:, None]
