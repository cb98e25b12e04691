"""The gated delta rule (arXiv 2412.06464, eq. 10) over whole sequences in chunks of matrix products, and token by token.

    S_t = a_t S_(t-1) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,    o_t = S_t q_t / sqrt(K),    a_t = exp(g_t)

Queries, keys (B, T, H, K), values (B, T, H, V), log decays g <= 0 and beta (B, T, H) go in; outputs (B, T, H, V) and the state
after the last token (B, H, K, V), the transpose of the paper's S, come out. Queries and keys are divided by their 2-norms here.
Called by mixers/gated_deltanet.

The chunked form is the paper's section 3.3: the updates of a chunk of C tokens are one triangular system. Its solution is
linear in the state S before the chunk, so that all products run for all chunks at once, and what remains from chunk to chunk
is S' = P + M S, one small product. The backward pass is written by hand: it keeps a few tensors of a chunk and computes the
others again. Legend: Z = chunks x B x H, the batch of all products; C tokens of a chunk; G_i sum of log decays up to token i.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lmu_dist.array_types import Float

NORM_EPS = 1e-6  # added to squared norms, as in fla and in Qwen3-Next
CHUNK_TOKENS = (16, 64)  # fewest and most tokens of a chunk


def chunk_tokens(length: int, n_keys: int) -> int:
    """Tokens of a chunk: the width of a key within CHUNK_TOKENS, or for shorter texts the next power of two of their length.

    Products inside of a chunk then take about as long as those with the state. On two cores 16 tokens are the fastest for keys
    of 16 channels, and 16 and 32 equally fast for keys of 32.
    """
    least, most = CHUNK_TOKENS
    return min(max(least, min(n_keys, most)), 1 << (length - 1).bit_length())


def recurrent(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """The rule token by token, to generate text."""
    q, k = _unit(q) * q.shape[-1] ** -0.5, _unit(k)
    outputs = list[Tensor]()
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        found = (k[:, t, :, None] @ state).squeeze(-2)
        update = beta[:, t, :, None] * (v[:, t] - found)
        state = state + k[:, t, :, :, None] * update[:, :, None]
        outputs.append((q[:, t, :, None] @ state).squeeze(-2))
    return torch.stack(outputs, 1), state


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()


def chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """The rule in chunks, for any T. Without a state the sequence starts from zeros.

    Decays stay logarithms until differences of sums are taken, which are never positive: no decay overflows, and one that
    underflows is 0. The sums are float64: after a strong decay they are much larger than their differences. Relative errors of
    the norm are below 1e-6 in float32 (tests/models/test_gated_deltanet.py).
    """
    (b, t, h, n_keys), n_values = q.shape, v.shape[-1]
    chunk = chunk_tokens(t, n_keys)
    # Tokens that fill up the last chunk have beta = 0 and g = 0, and leave the state as it is.
    q, k, v, g, beta = (_by_chunk(x, chunk) for x in (q, k, v, g.unsqueeze(-1), beta.unsqueeze(-1)))
    vectors, values = torch.cat([q, k], 3).flatten(0, 2), v.flatten(0, 2)
    total, beta = g.flatten(0, 2).squeeze(-1).double().cumsum(-1), beta.flatten(0, 2).squeeze(-1)
    initial = q.new_zeros(b * h, n_keys, n_values) if state is None else state.flatten(0, 1)
    out, end = _GatedDeltaRule.apply(vectors, values, total, beta, initial)  # pyright: ignore[reportGeneralTypeIssues]
    out = out.view(-1, b, h, chunk, n_values).permute(1, 0, 3, 2, 4).reshape(b, -1, h, n_values)
    return out[:, :t], end.view(b, h, n_keys, n_values)


def _by_chunk(x: Float[Tensor, "B T H E"], chunk: int) -> Float[Tensor, "N B H C E"]:
    """A view of the tokens of N chunks, padded with zeros. Chunks come first: all products of one time are a block."""
    if x.shape[1] % chunk:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4)


class _Chunks(NamedTuple):
    """Matrices of all chunks that the forward and the backward pass need."""

    decays: Tensor  # (Z, C, C): exp(G_i - G_j) for j <= i, else 0
    scores: Tensor  # (Z, 2C, C): q_i . k_j, and below k_i . k_j
    weights: Tensor  # (Z, C + K, C): scores of q times decays, and below the keys, decayed to the end of the chunk, transposed
    from_start: Tensor  # (Z, C, 1): exp(G_i)
    to_end: Tensor  # (Z, C, 1): exp(G_C - G_i)


def _matrices(query_keys: Tensor, total: Tensor) -> _Chunks:
    """From queries and below them keys (Z, 2C, K), and sums of log decays (Z, C) in float64."""
    chunk = total.shape[1]
    keys = query_keys[:, chunk:]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).triu(1)
    scores = query_keys @ keys.mT
    decays = scores.new_empty(len(scores), chunk, chunk)
    torch.sub(total[:, :, None], total[:, None], out=decays)  # faster than a tensor of them in float64
    decays.masked_fill_(later, -torch.inf).exp_()
    to_end = (total[:, -1:] - total).to(scores.dtype).exp_()[..., None]
    weights = scores.new_empty(len(scores), chunk + keys.shape[2], chunk)
    torch.mul(scores[:, :chunk], decays, out=weights[:, :chunk])
    torch.mul(keys.mT, to_end.mT, out=weights[:, chunk:])
    return _Chunks(decays, scores, weights, total.to(scores.dtype).exp()[..., None], to_end)


class _GatedDeltaRule(torch.autograd.Function):
    """Vectors of queries and below them keys (Z, 2C, K), values (Z, C, V), sums of log decays (float64) and beta (Z, C), the
    first state (B H, K, V) -> outputs (Z, C, V), the last state.

    With R = beta [v | e^G k], A_ij = beta_i (k_i . k_j) e^(G_i - G_j) below the diagonal and [U | W] = (I + A)^-1 R, the
    updates of a chunk are U - W S. With `weights` @ [U | W] = [o_U, o_W; P, M_W] follow o = o_U + (e^G q - o_W) S and
    S' = P + (e^(G_C) - M_W) S.
    """

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, values: Tensor, total: Tensor, beta: Tensor, initial: Tensor
    ) -> tuple[Tensor, Tensor]:
        z, chunk, n_values = values.shape
        length_inverse = torch.linalg.vector_norm(vectors, dim=2, keepdim=True).square_().add_(NORM_EPS).rsqrt_()
        length_inverse[:, :chunk] *= vectors.shape[2] ** -0.5
        query_keys = vectors * length_inverse
        keys = query_keys[:, chunk:]
        m = _matrices(query_keys, total)
        system = (m.scores[:, chunk:] * m.decays).mul_(beta[..., None])
        identity = torch.eye(chunk, dtype=values.dtype, device=values.device).expand(z, -1, -1)
        inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
        rhs = values.new_empty(z, chunk, n_values + keys.shape[2])
        torch.mul(values, beta[..., None], out=rhs[..., :n_values])
        torch.mul(keys, m.from_start * beta[..., None], out=rhs[..., n_values:])
        solved = inverse @ rhs
        found = m.weights @ solved
        transition = found[:, chunk:, n_values:].neg()
        transition.diagonal(0, 1, 2).add_(m.from_start[:, -1])
        added = found[:, chunk:, :n_values]
        before, end = _scan(transition, added, initial, reverse=False)
        readers = (query_keys[:, :chunk] * m.from_start).sub_(found[:, :chunk, n_values:])
        out = torch.baddbmm(found[:, :chunk, :n_values], readers, before)
        ctx.save_for_backward(query_keys, length_inverse, values, total, beta, inverse, solved, transition, readers, before)
        return out, end

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dout, dend = gradients
        query_keys, length_inverse, values, total, beta, inverse, solved, transition, readers, before = ctx.saved_tensors
        chunk, n_values = values.shape[1:]
        queries, keys = query_keys[:, :chunk], query_keys[:, chunk:]
        m = _matrices(query_keys, total)
        # The states, from the last chunk to the first.
        dreaders = dout @ before.mT
        dstates, dinitial = _scan(transition.mT, readers.mT @ dout, dend, reverse=True)
        dtransition = dstates @ before.mT
        # The products with the solved system, and the system.
        dfound = dout.new_empty(len(dout), m.weights.shape[1], solved.shape[2])
        dfound[:, :chunk, :n_values], dfound[:, chunk:, :n_values] = dout, dstates
        torch.neg(dreaders, out=dfound[:, :chunk, n_values:])
        torch.neg(dtransition, out=dfound[:, chunk:, n_values:])
        dweights = dfound @ solved.mT
        drhs = inverse.mT @ (m.weights.mT @ dfound)
        dsystem = (drhs @ solved.mT).neg_().tril_(-1)
        rhs_keys = keys * m.from_start
        dbeta = (drhs[..., :n_values] * values).sum(2) + (drhs[..., n_values:] * rhs_keys).sum(2)
        dsystem.mul_(m.decays)
        moved = dsystem * m.scores[:, chunk:]
        dbeta += moved.sum(2)
        drhs.mul_(beta[..., None])
        # Scores and decays.
        dscores = torch.empty_like(m.scores)
        torch.mul(dweights[:, :chunk], m.decays, out=dscores[:, :chunk])
        torch.mul(dsystem, beta[..., None], out=dscores[:, chunk:])
        moved.mul_(beta[..., None]).addcmul_(dscores[:, :chunk], m.scores[:, :chunk])
        moved.diagonal(0, 1, 2).zero_()  # a token reads its own update without a decay, and both sums would cancel
        # Shares of decays between later tokens cancel too: sums in float64 leave no rounding to be multiplied by strong decays.
        drhs_keys, dreaders = drhs[..., n_values:], dreaders.mul_(m.from_start)
        dkept = dweights[:, chunk:].mT * m.to_end
        from_end = (dkept * keys).sum(2)
        dtotal = moved.sum(2, dtype=torch.float64) - moved.sum(1, dtype=torch.float64)
        dtotal += (drhs_keys * rhs_keys).sum(2) + (dreaders * queries).sum(2)
        dtotal -= from_end
        trace = dtransition.diagonal(0, 1, 2).sum(1) * m.from_start[:, -1, 0]
        dtotal[:, -1] += from_end.sum(1, dtype=torch.float64) + trace
        dquery_keys = dscores @ keys
        dquery_keys[:, chunk:] += dscores.mT @ query_keys
        dquery_keys[:, :chunk] += dreaders
        dquery_keys[:, chunk:].addcmul_(drhs_keys, m.from_start).add_(dkept)
        # Unit vectors u = x / |x|: dx = (du - u (u . du)) / |x|; queries are u / sqrt(K).
        along = (dquery_keys * query_keys).sum(2, keepdim=True)
        along[:, :chunk] *= query_keys.shape[2]
        dvectors = dquery_keys.addcmul_(query_keys, along, value=-1).mul_(length_inverse)
        return dvectors, drhs[..., :n_values], dtotal, dbeta, dinitial


def _scan(
    transition: Float[Tensor, "Z K K"], added: Float[Tensor, "Z K V"], state: Float[Tensor, "BH K V"], reverse: bool
) -> tuple[Float[Tensor, "Z K V"], Float[Tensor, "BH K V"]]:
    """The state that comes into every chunk, and the one that leaves the last: S <- transition S + added."""
    (n_rows, *_), rows = state.shape, state
    states, steps = added.contiguous().unflatten(0, (-1, n_rows)), transition.unflatten(0, (-1, n_rows)).unbind()
    each = list(zip(states.unbind(), steps, strict=True))
    for state_c, transition_c in reversed(each) if reverse else each:
        rows = torch.baddbmm(state_c, transition_c, rows, out=state_c)  # in place; torch's flop counter misses baddbmm_
    parts = (states[1:], state[None]) if reverse else (state[None], states[:-1])
    return torch.cat(parts).flatten(0, 1), rows.clone()


def flops(length: int, n_keys: int, n_values: int) -> float:
    """Forward FLOPs per token of one head in the matrix products of `chunked`; tokens that fill up the last chunk count too."""
    chunk, both = chunk_tokens(length, n_keys), n_keys + n_values
    scores, solution = 4 * chunk * n_keys, 2 * chunk * both
    per_token = scores + solution + 2 * (chunk + n_keys) * both + 2 * n_keys * n_values
    of_state = 2 * n_keys**2 * n_values / chunk
    return (per_token + of_state) * (-(-length // chunk) * chunk / length)


def recomputed_flops(length: int, n_keys: int) -> float:
    """FLOPs per token of one head that the backward pass of `chunked` computes again: the scores."""
    chunk = chunk_tokens(length, n_keys)
    return 4 * chunk * n_keys * (-(-length // chunk) * chunk / length)


def saved_elements(length: int, n_keys: int, n_values: int) -> float:
    """Elements per token of one head that `chunked` saves for the backward pass, padding included."""
    chunk = chunk_tokens(length, n_keys)
    per_token = 4 * n_keys + 2 * n_values + chunk + 5  # vectors, readers, values, solution, inverse, scalars
    per_chunk = n_keys * (n_keys + n_values)  # transition, state
    return (per_token + per_chunk / chunk) * (-(-length // chunk) * chunk / length)
