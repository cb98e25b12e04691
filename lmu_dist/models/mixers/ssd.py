"""State space duality (arXiv 2405.21060, section 6) over whole sequences in chunks of matrix products, and token by token.

    S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T,    y_t = S_t^T C_t + D x_t    for every head

Inputs x (B, T, H, P), steps dt (B, T, H), decay rates A < 0 and skips D (H), input and output maps B, C (B, T, G, N), each for
H / G heads, go in; outputs (B, T, H, P) and the state after the last token (B, G, N, H / G, P) come out. Called by
mixers/mamba2.

The heads of a group share B and C, so that their states are one wide product; only the products with the decayed scores are
single. From chunk to chunk remains S' = a S + P. The backward pass is written by hand: it keeps the states before the chunks,
and computes scores and decays again. Legend: Z = B x chunks x G, L tokens of a chunk, h heads of a group,
G_i the sum of log decays up to token i.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lmu_dist.array_types import Float

CHUNK_TOKENS = 32  # the fastest of 16, 32 and 64 on a processor with AVX-512 (LOG.md)


def chunk_tokens(length: int) -> int:
    """Tokens of a chunk: CHUNK_TOKENS, or for shorter texts the next power of two."""
    return min(CHUNK_TOKENS, 1 << (length - 1).bit_length())


def recurrent(
    x: Float[Tensor, "B T H P"],
    dt: Float[Tensor, "B T H"],
    rates: Float[Tensor, "H"],
    b: Float[Tensor, "B T G N"],
    c: Float[Tensor, "B T G N"],
    skip: Float[Tensor, "H"],
    state: Float[Tensor, "B G N h P"],
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B G N h P"]]:
    """The recurrence token by token, to generate text."""
    n_groups, outputs = b.shape[2], list[Tensor]()
    decays = (dt * rates).exp().unflatten(2, (n_groups, -1))
    inputs = (x * dt[..., None]).unflatten(2, (n_groups, -1))
    for t in range(x.shape[1]):
        state = state * decays[:, t, :, None, :, None] + b[:, t, :, :, None, None] * inputs[:, t, :, None]
        outputs.append((c[:, t, :, None] @ state.flatten(3)).reshape(x[:, t].shape))
    return torch.stack(outputs, 1) + x * skip[:, None], state


def chunked(
    x: Float[Tensor, "B T H P"],
    dt: Float[Tensor, "B T H"],
    rates: Float[Tensor, "H"],
    b: Float[Tensor, "B T G N"],
    c: Float[Tensor, "B T G N"],
    skip: Float[Tensor, "H"],
    state: Float[Tensor, "B G N h P"] | None = None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B G N h P"]]:
    """The recurrence in chunks, for any T. Without a state the sequence starts from zeros.

    Decays stay logarithms until differences of sums are taken, which are never positive: no decay overflows, and one that
    underflows is 0. The sums are float64: after a large step they are much larger than their differences. Relative errors of
    the norm are below 1e-6 in float32 (tests/models/test_mamba2.py).
    """
    (n_rows, length, n_heads, head_dim), (n_groups, d_state) = x.shape, b.shape[2:]
    chunk, per_group = chunk_tokens(length), n_heads // n_groups

    def by_chunk(t: Tensor, *sizes: int) -> Tensor:
        """(B, T, ..) -> (B, chunks, G, L, ..). Tokens that fill up the last chunk have dt = 0 and leave the state as it is."""
        if length % chunk:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, -length % chunk))
        return t.reshape(n_rows, -1, chunk, n_groups, *sizes).transpose(2, 3)

    steps = by_chunk(dt, per_group)
    log_decays = (steps * rates.view(n_groups, 1, per_group)).double().cumsum(3)
    initial = x.new_zeros(n_rows, n_groups, d_state, per_group, head_dim) if state is None else state
    maps = (by_chunk(t, d_state) for t in (b, c))
    y, end = _Chunks.apply(by_chunk(x, per_group, head_dim), steps, log_decays, *maps, skip.view(n_groups, per_group), initial)  # pyright: ignore[reportGeneralTypeIssues]
    return y.transpose(2, 3).reshape(n_rows, -1, n_heads, head_dim)[:, :length], end


def _decays(log_decays: Float[Tensor, "B n G L h"], dtype: torch.dtype) -> Float[Tensor, "B n G h L L"]:
    """exp(G_i - G_j) for j <= i, else 0, from sums in float64."""
    total = log_decays.transpose(-1, -2)
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    differences = torch.empty(*total.shape, total.shape[-1], dtype=dtype, device=total.device)
    torch.sub(total[..., :, None], total[..., None, :], out=differences)  # faster than a tensor of them in float64
    return differences.masked_fill_(later, -torch.inf).exp_()


def _decays_of_states(
    log_decays: Float[Tensor, "B n G L h"], dtype: torch.dtype
) -> tuple[Float[Tensor, "B n G L h"], Float[Tensor, "B n G L h"]]:
    """exp(G_i) and exp(G_L - G_i), from sums in float64."""
    return log_decays.to(dtype).exp(), (log_decays[..., -1:, :] - log_decays).to(dtype).exp_()


class _Chunks(torch.autograd.Function):
    """x (B, n, G, L, h, P), steps and, in float64, sums of log decays (B, n, G, L, h), B and C (B, n, G, L, N), skips (G, h),
    first state (B, G, N, h, P) -> outputs (B, n, G, L, h, P), last state.

    y = (decays (C B^T) diag(dt) + D) x + e^G C S for every head, S' = e^(G_L) S + B^T (dt e^(G_L - G) x).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, steps: Tensor, log_decays: Tensor, b: Tensor, c: Tensor, skip: Tensor, initial: Tensor
    ) -> tuple[Tensor, Tensor]:
        from_start, to_end = _decays_of_states(log_decays, x.dtype)
        after = from_start[..., -1, :]
        added = (b.mT @ (x * (steps * to_end)[..., None]).flatten(-2)).unflatten(-1, x.shape[-2:])
        before, end = _scan(after, added, initial, reverse=False)
        mixing = _decays(log_decays, x.dtype).mul_((c @ b.mT).unsqueeze(3)).mul_(steps.transpose(-1, -2)[..., None, :])
        mixing.diagonal(0, -2, -1).add_(skip[:, :, None])
        inside = mixing @ x.transpose(-2, -3)
        y = torch.addcmul(inside.transpose(-2, -3), (c @ before.flatten(-2)).view_as(x), from_start[..., None])
        ctx.save_for_backward(x, steps, log_decays, b, c, skip, before)
        return y, end

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, dend = gradients
        x, steps, log_decays, b, c, skip, before = ctx.saved_tensors
        from_start, to_end = _decays_of_states(log_decays, x.dtype)
        after = from_start[..., -1, :]
        # The states, from the last chunk to the first.
        dread = (dy * from_start[..., None]).flatten(-2)
        dafter, dinitial = _scan(after, (c.mT @ dread).view_as(before), dend, reverse=True)
        dadded = (b @ dafter.flatten(-2)).view_as(x)
        # The products inside of chunks.
        decays, dy_heads = _decays(log_decays, x.dtype), dy.transpose(-2, -3)
        dmixing = dy_heads @ x.transpose(-2, -3).mT
        on_diagonal = dmixing.diagonal(0, -2, -1).clone()
        dmixing.mul_(decays)
        steps_by_head, scores = steps.transpose(-1, -2), (c @ b.mT).unsqueeze(3)
        dscores = (dmixing * steps_by_head[..., None, :]).sum(3)
        dinput = (decays.mul_(scores).mT @ dy_heads).transpose(-2, -3)
        dinput = torch.addcmul(dinput, dadded, to_end[..., None])
        dx = (dinput * steps[..., None]).addcmul_(dy, skip[:, None, :, None])
        written = (x * (steps * to_end)[..., None]).flatten(-2)
        db = torch.baddbmm((dscores.mT @ c).flatten(0, 2), written.flatten(0, 2), _flat(dafter).mT)
        dc = torch.baddbmm((dscores @ b).flatten(0, 2), dread.flatten(0, 2), _flat(before).mT)
        # Steps and decays. What a token adds to its own output has no decay: it is left out, since its share would cancel.
        # Shares of decays between later tokens cancel too: sums in float64 leave no rounding that a large step would multiply.
        moved = dmixing.mul_(scores)
        at_once = moved.diagonal(0, -2, -1).clone()
        moved.diagonal(0, -2, -1).zero_()
        later, at_end = moved.sum(-2), (x * dadded).sum(-1) * to_end
        dsteps = (later + at_once).transpose(-1, -2) + at_end
        moved, at_end = moved.mul_(steps_by_head[..., None, :]), at_end * steps
        read = (dread.view_as(x) * (c @ before.flatten(-2)).view_as(x)).sum(-1)
        inside = moved.sum(-1, dtype=torch.float64) - moved.sum(-2, dtype=torch.float64)
        dlog = inside.transpose(-1, -2) + read - at_end
        dlog[..., -1, :] += at_end.sum(-2, dtype=torch.float64) + (dafter * before).sum((-3, -1)) * after
        return dx, dsteps, dlog, db.view_as(b), dc.view_as(c), on_diagonal.sum((0, 1, 4)), dinitial


def _flat(states: Float[Tensor, "B n G N h P"]) -> Float[Tensor, "Z N E"]:
    return states.flatten(0, 2).flatten(2)


def _scan(
    after: Float[Tensor, "B n G h"], added: Float[Tensor, "B n G N h P"], state: Float[Tensor, "B G N h P"], reverse: bool
) -> tuple[Float[Tensor, "B n G N h P"], Float[Tensor, "B G N h P"]]:
    """The state that comes into every chunk, and the one that leaves the last: S <- after S + added."""
    incoming, order = torch.empty_like(added), range(added.shape[1])
    order = order[::-1] if reverse else order
    places = [*(incoming[:, i] for i in order[1:]), torch.empty_like(state)]
    incoming[:, order[0]] = state
    for i, place in zip(order, places, strict=True):
        state = torch.addcmul(added[:, i], state, after[:, i, :, None, :, None], out=place)
    return incoming, state


def flops(length: int, n_heads: int, head_width: int, d_state: int, n_groups: int) -> float:
    """Forward FLOPs per token in the matrix products of `chunked`; tokens that fill up the last chunk count too."""
    chunk, inner = chunk_tokens(length), n_heads * head_width
    per_token = 2 * n_groups * chunk * d_state + 2 * chunk * inner + 4 * d_state * inner
    return per_token * (-(-length // chunk) * chunk / length)


def saved_elements(length: int, n_heads: int, head_width: int, d_state: int, n_groups: int) -> float:
    """Elements per token that `chunked` saves for the backward pass, padding included: inputs, sums, states of chunks."""
    chunk, inner = chunk_tokens(length), n_heads * head_width
    padding = -(-length // chunk) * chunk / length
    inputs, states = inner + 2 * n_groups * d_state, inner * d_state / chunk
    return (inputs + states) * padding + 3 * n_heads  # a sum is float64: two elements


def recomputed_flops(length: int, n_heads: int, head_width: int, d_state: int, n_groups: int) -> float:
    """FLOPs per token that the backward pass of `chunked` computes again: scores, and what tokens read from the states."""
    chunk, inner = chunk_tokens(length), n_heads * head_width
    per_token = 2 * n_groups * chunk * d_state + 2 * d_state * inner
    return per_token * (-(-length // chunk) * chunk / length)
