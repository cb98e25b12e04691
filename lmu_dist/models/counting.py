"""Counts the parameters, FLOPs and saved bytes of any torch modules on the meta device.

Tensors on the meta device have a shape and no content, so nothing is computed and no memory is used. models/family uses these
counts for every family that does not define its own.
"""

from collections.abc import Sequence

import torch
from torch import nn

META = torch.device("meta")


def n_params(sublayers: Sequence[nn.Module]) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for sublayer in sublayers for p in sublayer.parameters())


def largest_tensor(sublayers: Sequence[nn.Module]) -> int:
    """Elements of the largest trainable tensor."""
    return max((p.numel() for sublayer in sublayers for p in sublayer.parameters()), default=0)


def matmul_flops(sublayers: Sequence[nn.Module], d_model: int, sequence_tokens: int) -> float:
    """Forward FLOPs per token in matrix products, by torch's flop counter. A multiply-add counts 2."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, 0.3 s; families with formulas need neither

    x = torch.empty(1, sequence_tokens, d_model, device=META)
    counter = FlopCounterMode(display=False)
    # The counter does not see the products of fused attention.
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        for sublayer in sublayers:
            sublayer(x)
    return counter.get_total_flops() / sequence_tokens


def saved_bytes(sublayers: Sequence[nn.Module], d_model: int, sequence_tokens: int, n_rows: int, dtype: torch.dtype) -> float:
    """Bytes that autograd saves for the backward pass of `n_rows` rows, without weights. Each storage counts once."""
    saved: dict[int, torch.Tensor] = {}

    def save(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage()._cdata] = t  # holds the tensor, so that no other storage gets its address
        return t

    total = 0
    for sublayer in sublayers:
        converted = sublayer.to(dtype)
        weights = {p.untyped_storage()._cdata for p in converted.parameters()}
        x = torch.empty(n_rows, sequence_tokens, d_model, device=META, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            converted(x)
        total += sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in weights)
        saved.clear()
    return total


def bytes_of(precision: str) -> int:
    """Bytes of a number in a precision, fp32 or bf16."""
    return 4 if precision == "fp32" else 2
