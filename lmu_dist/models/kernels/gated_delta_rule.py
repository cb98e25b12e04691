"""The gated delta rule token by token in C++, on a CPU: an autograd function around gated_delta_rule.cpp.

It computes what mixers/gated_delta_rule.chunked does, in a fraction of the time for the widths of small models: the memory of
a head stays in the processor's cache. Called by mixers/gated_deltanet.
Legend: B batch, T time, H heads, K and V channels of a key and of a value, C = H (2 K + V).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmu_dist.array_types import Float
from lmu_dist.models.kernels import compiled

CHUNK_TOKENS = 32  # tokens between two memories that are kept; the same number as in gated_delta_rule.cpp


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes inputs of this precision on this device."""
    if dtype != torch.float32 or not compiled.is_available(dtype, device):
        return False
    loaded = compiled.library()
    assert loaded is not None
    assert loaded.lmu_gated_delta_rule_chunk() == CHUNK_TOKENS, "CHUNK differs between C++ and Python"
    return True


def gated_delta_rule(
    packed: Float[Tensor, "B T C"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    key_width: int,
    state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs and the state after the last token. `packed` has the queries of all heads, then their keys, then their values.

    The state is that of mixers/gated_delta_rule; without one the sequence starts from zeros.
    """
    rows, _, channels = packed.shape
    heads = g.shape[2]
    if state is None:
        state = packed.new_zeros(rows, heads, key_width, channels // heads - 2 * key_width)
    return _GatedDeltaRule.apply(packed.contiguous(), g.contiguous(), beta.contiguous(), state)  # pyright: ignore[reportReturnType]


class _GatedDeltaRule(torch.autograd.Function):
    """The arguments of `gated_delta_rule`, contiguous. Keeps them, and the memory before every chunk."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        (rows, heads, keys, values), tokens = state.shape, packed.shape[1]
        states = packed.new_empty(rows, heads, -(-tokens // CHUNK_TOKENS) + 1, keys, values)
        states[:, :, 0] = state
        out = packed.new_empty(rows, tokens, heads, values)
        sizes = (rows, tokens, heads, keys, values)
        compiled.call("lmu_gated_delta_rule_forward", packed.dtype, sizes, (packed, g, beta, states, out))
        ctx.save_for_backward(packed, g, beta, states)
        return out, states[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed, g, beta, states = ctx.saved_tensors
        dout, dend = (gradient.contiguous() for gradient in gradients)
        to = [torch.empty_like(x) for x in (packed, g, beta, dend)]
        rows, tokens, heads, values = dout.shape
        sizes = (rows, tokens, heads, states.shape[3], values)
        compiled.call("lmu_gated_delta_rule_backward", packed.dtype, sizes, (packed, g, beta, states, dout, dend, *to))
        return tuple(to)


def saved_elements(n_keys: int, n_values: int) -> float:
    """Elements per token of one head that are saved for the backward pass: inputs, scalars, memories."""
    return 2 * n_keys + n_values + 2 + n_keys * n_values / CHUNK_TOKENS
