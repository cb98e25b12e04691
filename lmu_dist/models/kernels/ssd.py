"""State space duality in C++, on a CPU: an autograd function around ssd.cpp.

It computes what mixers/ssd.chunked does, in half the time (LOG.md): the states of a few heads stay in the processor's cache.
Called by mixers/mamba2. Legend: B batch, T time, H heads of P channels, G groups of h heads that share maps of N channels,
C = H P + 2 G N channels of x and both maps, Q the channels P in whole cache lines.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmu_dist.array_types import Float
from lmu_dist.models.kernels import compiled

CHUNK_TOKENS = 32  # tokens between two states that are kept; the same number as in ssd.cpp
MOST_HEADS = 4  # heads that one thread takes through a sequence together; the same number as in ssd.cpp


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes inputs of this precision on this device."""
    if dtype != torch.float32 or not compiled.is_available(dtype, device):
        return False
    loaded = compiled.library()
    assert loaded is not None
    in_cpp = loaded.lmu_ssd_chunk(), loaded.lmu_ssd_most_heads()
    assert in_cpp == (CHUNK_TOKENS, MOST_HEADS), "constants differ between ssd.cpp and ssd.py"
    return True


def state_space(
    packed: Float[Tensor, "B T C"],
    dt: Float[Tensor, "B T H"],
    rates: Float[Tensor, "H"],
    skip: Float[Tensor, "H"],
    sizes: tuple[int, int],
    state: Float[Tensor, "B G N h P"] | None = None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B G N h P"]]:
    """Outputs and the state after the last token. `packed` has x of all heads, then B of all groups, then C.

    `sizes` are G and N. The state is that of mixers/ssd; without one the sequence starts from zeros.
    """
    (rows, _, channels), n_heads, (n_groups, d_state) = packed.shape, len(rates), sizes
    if state is None:
        head_width = (channels - 2 * n_groups * d_state) // n_heads
        state = packed.new_zeros(rows, n_groups, d_state, n_heads // n_groups, head_width)
    given = (packed, dt, rates, skip)
    return _StateSpace.apply(*(tensor.contiguous() for tensor in given), state)  # pyright: ignore[reportReturnType]


class _StateSpace(torch.autograd.Function):
    """The arguments of `state_space`, contiguous. Keeps them, and the state before every chunk."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, dt: Tensor, rates: Tensor, skip: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        (rows, groups, d_state, *_), tokens, heads = state.shape, packed.shape[1], len(rates)
        first = _by_head(state)
        states = packed.new_empty(rows, heads, -(-tokens // CHUNK_TOKENS) + 1, *first.shape[2:])
        states[:, :, 0] = first
        out = packed.new_empty(rows, tokens, heads, state.shape[4])
        sizes = (*out.shape, groups, d_state)
        compiled.call("lmu_ssd_forward", packed.dtype, sizes, (packed, dt, rates, skip, states, out))
        ctx.save_for_backward(packed, dt, rates, skip, states)
        ctx.sizes = sizes
        return out, _from_heads(states[:, :, -1], state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, (dout, dend) = ctx.saved_tensors, gradients
        packed, dt, rates = saved[:3]
        rows, tokens, heads, width, groups, _ = ctx.sizes
        n_parts, n_maps = -(-heads // groups // MOST_HEADS), packed.shape[2] - heads * width
        dpacked, ddt, dstate = torch.empty_like(packed), torch.empty_like(dt), _by_head(dend)
        dmaps = packed.new_empty(rows, tokens, n_parts, n_maps)  # of B and C, by the heads of each part of a group
        drates, dskip = rates.new_empty(rows, heads), rates.new_empty(rows, heads)
        to = (dpacked, dmaps, ddt, drates, dskip, dstate)
        compiled.call("lmu_ssd_backward", packed.dtype, ctx.sizes, (*saved, dout.contiguous(), *to))
        torch.sum(dmaps, 2, out=dpacked[..., heads * width :])
        return dpacked, ddt, drates.sum(0), dskip.sum(0), _from_heads(dstate, dend.shape)


def _by_head(state: Float[Tensor, "B G N h P"]) -> Float[Tensor, "B H N Q"]:
    """The states of heads one after the other, with rows of whole cache lines, filled up with zeros. A copy."""
    rows, groups, d_state, per_group, width = state.shape
    by_head = state.new_zeros(rows, groups, per_group, d_state, _padded(width))
    by_head[..., :width] = state.transpose(2, 3)
    return by_head.flatten(1, 2)


def _from_heads(states: Float[Tensor, "B H N Q"], shape: torch.Size) -> Float[Tensor, "B G N h P"]:
    """The inverse of `_by_head`. A copy: a state that is kept must not keep those of all chunks."""
    by_group = states[..., : shape[4]].unflatten(1, (shape[1], shape[3])).transpose(2, 3)
    return by_group.clone(memory_format=torch.contiguous_format)


def saved_elements(length: int, n_heads: int, head_width: int, d_state: int, n_groups: int) -> float:
    """Elements per token that are saved for the backward pass: inputs, the states before the chunks, and the last one."""
    states = (-(-length // CHUNK_TOKENS) + 1) * n_heads * d_state * _padded(head_width)
    return n_heads * (head_width + 1) + 2 * n_groups * d_state + states / length


def _padded(head_width: int) -> int:
    """Numbers of the cache lines that hold a row of a state."""
    return -(-head_width // compiled.LINE) * compiled.LINE
