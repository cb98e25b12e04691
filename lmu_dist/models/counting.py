"""Counts of any torch module without hand-written formulas: modules on the meta device in, parameters, FLOPs and bytes out.

Nothing is computed and no memory is used: tensors on the meta device have a shape and no content. models/family takes these
counts for every family that does not bring its own.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")


def n_params(sublayers: Sequence[nn.Module]) -> int:
    """Number of trained parameters, by numel()."""
    return sum(p.numel() for sublayer in sublayers for p in sublayer.parameters())


def largest_tensor(sublayers: Sequence[nn.Module]) -> int:
    """Elements of the largest trained tensor."""
    return max((p.numel() for sublayer in sublayers for p in sublayer.parameters()), default=0)


def matmul_flops(sublayers: Sequence[nn.Module], d_model: int, sequence_tokens: int) -> float:
    """Forward FLOPs per token of a sequence of n tokens, by torch's flop counter: matrix products only, 2 per multiply-add."""
    x = torch.empty(1, sequence_tokens, d_model, device=META)
    counter = FlopCounterMode(display=False)
    # Fused attention hides its products from the counter.
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        for sublayer in sublayers:
            sublayer(x)
    return counter.get_total_flops() / sequence_tokens


def saved_bytes(sublayers: Sequence[nn.Module], d_model: int, sequence_tokens: int, n_rows: int, dtype: torch.dtype) -> float:
    """Bytes that autograd keeps between forward and backward of `n_rows` rows, weights not counted, each storage once."""
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage()._cdata] = t  # the tensor too, so that no other storage gets its address
        return t

    total = 0
    for sublayer in sublayers:
        own = sublayer.to(dtype)
        weights = {p.untyped_storage()._cdata for p in own.parameters()}
        x = torch.empty(n_rows, sequence_tokens, d_model, device=META, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            own(x)
        total += sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
        kept.clear()
    return total


def bytes_of(precision: str) -> int:
    """Bytes of a number in a model's precision, fp32 or bf16."""
    return 4 if precision == "fp32" else 2
