"""The LMU in chunks of tokens: matrix products in place of Fourier transforms.

The projected memory at the tokens of a chunk depends on the chunk's C inputs (a Toeplitz product) and on the memory before the
chunk. Together that is one product W z with z = [inputs; memory; 1], for all channels at once. It is exact and O(T): Abar^C
takes the memory from one chunk to the next. `chunk_weights` makes W and `chunk_features` makes z. `fused_lmu` passes the
product to the attention kernel one block at a time, so that the projected memory of a whole sequence is never stored on a GPU;
its backward pass recomputes it. Called by mixer.

Legend: B batch, T time, D width, Q order, R reduced order, K = 3R rows of the projection; C tokens of a chunk, N chunks,
F features: C + Q + 1, and zeros up to a multiple of FEATURE_MULTIPLE. Pre-activations are the projected memory plus bias.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models.kernels import implicit_attention
from lmu_dist.models.mixers.lmu import legendre
from lmu_dist.models.mixers.lmu.scan import parallel_scan, scan_products
from lmu_dist.models.precision import product_dtype

CPU_BLOCK = 2**21  # pre-activations of a block: 8 MB in float32, so that they stay in the processor's caches
GPU_BLOCK = 2**27  # a GPU's caches are too small for that: a block is large enough to hide the cost of launching its kernels
FEATURE_MULTIPLE = 16  # a GPU's matrix units need rows that begin at multiples of 16 bytes, and like more


def n_features(order: int, chunk: int, length: int) -> int:
    """Number F of features of a chunk of `chunk` tokens. A single chunk, of all `length` tokens, has no memory before it."""
    used = chunk + 1 + (order if chunk < length else 0)
    return used + -used % FEATURE_MULTIPLE


def multiply_adds(order: int, n_projections: int, width: int, length: int, n_rows: int, chunk: int) -> tuple[float, float]:
    """Multiply-adds per token of `fused_lmu` on a GPU before its attention: forward, and backward.

    `n_rows` is the batch size. The backward pass computes the pre-activations again.
    """
    n_chunks = -(-length // chunk)
    columns, n_tokens = n_rows * n_chunks * width, n_rows * length
    product = chunk * n_projections * n_features(order, chunk, length) * columns
    weights = n_projections * order * chunk
    memory = 0
    if chunk < length:
        weights += n_projections * order**2 * chunk
        memory = order * chunk * columns + order**2 * n_rows * width * scan_products(n_chunks)
    return (product + weights + memory) / n_tokens, (3 * product + weights + memory) / n_tokens


def chunk_tokens(order: int, n_projections: int, width: int, length: int, n_rows: int) -> int:
    """Number C of tokens of a chunk that minimises the multiply-adds per token, forward and backward.

    Returns `length` if a single chunk is cheapest. `n_rows` is the batch size.
    """
    sizes = [*(2**i for i in range(5, 9) if 2**i < length), length]
    return min(sizes, key=lambda chunk: sum(multiply_adds(order, n_projections, width, length, n_rows, chunk)))


@dataclass(frozen=True)
class ChunkTransition:
    """What C tokens do to the memory, in units of its row scale.

    a_powers, a_pow_steps and a_pow_chunk are those of `legendre.chunk_powers`; response (Q, C) is Bbar, Abar Bbar .. Abar^C
    itself is float64, since a recurrence accumulates rounding errors. With a single chunk no memory is passed on, and there are
    no powers.
    """

    a_powers: Tensor
    a_pow_steps: Tensor
    response: Tensor
    a_pow_chunk: Tensor

    @property
    def chunk(self) -> int:
        """Number C of tokens."""
        return self.response.shape[1]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # training uses cached tensors too, and autograd refuses tensors made in inference mode
def chunk_transition(
    order: int, theta_tokens: float, chunk: int, dtype: torch.dtype, device: torch.device, single_chunk: bool = False
) -> ChunkTransition:
    """Transition of a chunk of `chunk` tokens, computed in float64 and cast last."""
    scale = torch.from_numpy(legendre.row_scale(order, theta_tokens))
    response = (torch.from_numpy(legendre.impulse_response(order, theta_tokens, chunk)) / scale[:, None]).to(device, dtype)
    if single_chunk:
        none = response.new_empty(0, order, order)
        return ChunkTransition(none, none, response, response.new_empty(0, 0))
    arrays = legendre.chunk_powers(order, theta_tokens, chunk, "f8" if dtype == torch.float64 else "f4")
    a_powers, a_pow_steps, a_pow_chunk = (torch.from_numpy(a).to(device) for a in arrays)
    return ChunkTransition(a_powers, a_pow_steps, response, a_pow_chunk)


class ChunkedConfig(NamedTuple):
    """How `fused_lmu` runs.

    transition           of its chunks
    single_chunk         whether one chunk holds the whole sequence, so that no memory is passed on
    dtype                precision of the products
    block_chunks         number of chunks of a block
    keep_preactivations  whether to keep them for the backward pass, which pays on a CPU, or to recompute them
    score_scale          factor of the scores of the attention
    """

    transition: ChunkTransition
    single_chunk: bool
    dtype: torch.dtype
    block_chunks: int
    keep_preactivations: bool
    score_scale: float = 1.0


def chunked_config(
    x: Float[Tensor, "B T D"], n_projections: int, order: int, theta_tokens: float, score_scale: float = 1.0
) -> ChunkedConfig:
    """Configuration for whole sequences of this shape, precision and device."""
    n_rows, length, width = x.shape
    chunk = chunk_tokens(order, n_projections, width, length, n_rows)
    memory_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = product_dtype(x.dtype, x.device)
    on_triton = implicit_attention.implementation(dtype, x.device, n_projections // 3) == "triton"
    block_chunks = max(1, (GPU_BLOCK if on_triton else CPU_BLOCK) // (chunk * n_projections * width))
    block_chunks -= block_chunks % 16 if block_chunks > 16 else 0  # so that blocks begin at multiples of 16 bytes
    single_chunk = chunk >= length
    transition = chunk_transition(order, theta_tokens, chunk, memory_dtype, x.device, single_chunk)
    return ChunkedConfig(transition, single_chunk, dtype, block_chunks, x.device.type == "cpu", score_scale)


def chunk_weights(
    projection: Float[Tensor, "K Q"], bias: Float[Tensor, "K"], transition: ChunkTransition, single_chunk: bool = False
) -> Float[Tensor, "CK F"]:
    """W, which maps the features of a chunk to the pre-activations of its tokens."""
    chunk = transition.chunk
    kernel = F.pad((projection @ transition.response).flip(1), (0, chunk - 1))  # (K, 2C - 1): the longest lag first, then zeros
    toeplitz = kernel.unfold(1, chunk, 1).flip(1).transpose(0, 1)  # (C, K, C)
    of_memory = [] if single_chunk else [_times_powers(projection, transition)]
    of_one = bias.expand(chunk, len(bias))[..., None]
    padding = -(chunk + len(of_memory) * projection.shape[1] + 1) % FEATURE_MULTIPLE
    return torch.cat([toeplitz, *of_memory, F.pad(of_one, (0, padding))], 2).flatten(0, 1)


def _times_powers(projection: Float[Tensor, "K Q"], transition: ChunkTransition) -> Float[Tensor, "C K Q"]:
    """projection @ Abar, .. projection @ Abar^C. As many operations as C products, on 2 sqrt(C) matrices."""
    first = projection @ transition.a_powers
    later = first.flatten(0, 1) @ transition.a_pow_steps
    return torch.cat([first, later.unflatten(1, first.shape[:2]).flatten(0, 1)])[: transition.chunk]


def _times_powers_backward(dproducts: Float[Tensor, "C K Q"], transition: ChunkTransition) -> Float[Tensor, "K Q"]:
    """Gradient of the projection from that of `_times_powers`. C is a multiple of S here."""
    n_first = len(transition.a_powers)
    dfirst, dlater = dproducts[:n_first], dproducts[n_first:].unflatten(0, (-1, n_first))
    dfirst = dfirst + (dlater.flatten(1, 2) @ transition.a_pow_steps.mT).sum(0).view_as(dfirst)
    return torch.einsum("skr,sqr->kq", dfirst, transition.a_powers)


def _chunk_weights_backward(
    dw: Float[Tensor, "CK F"], transition: ChunkTransition
) -> tuple[Float[Tensor, "K Q"], Float[Tensor, "K"]]:
    """Gradients of projection and bias from d W."""
    chunk, n_memory = transition.chunk, len(transition.a_pow_chunk)
    dw = dw.unflatten(0, (chunk, -1))
    toeplitz, of_memory, of_one = dw[..., :chunk], dw[..., chunk : chunk + n_memory], dw[..., chunk + n_memory]
    # Each row is padded to 2C elements and viewed as a row of 2C - 1, which shifts row i by i: diagonals become columns.
    skewed = F.pad(toeplitz.transpose(0, 1).flip(1), (0, chunk)).flatten(1)[:, :-chunk].unflatten(1, (chunk, 2 * chunk - 1))
    dprojection = skewed.sum(1)[:, :chunk].flip(1) @ transition.response.T
    if n_memory:
        dprojection += _times_powers_backward(of_memory, transition)
    return dprojection, of_one.sum(0)


def use_sequential_scan(device: torch.device) -> bool:
    """Whether a loop over chunks replaces `parallel_scan`: on a CPU, where small products have no launch overhead."""
    return device.type == "cpu"


def chunk_features(
    x: Float[Tensor, "B T D"], transition: ChunkTransition, m: Float[Tensor, "Q BD"] | None = None, single_chunk: bool = False
) -> tuple[Float[Tensor, "F B N D"], Float[Tensor, "Q BD"] | None]:
    """z of every chunk, and the memory after the last chunk. `m` is the memory before the first one; None: empty."""
    (b, t, d), (q, chunk) = x.shape, transition.response.shape
    n = -(-t // chunk)
    inputs = F.pad(x, (0, 0, 0, n * chunk - t)).unflatten(1, (n, chunk)).permute(2, 0, 1, 3)
    used = chunk + 1 + (0 if single_chunk else q)
    one = x.new_zeros(1 + -used % FEATURE_MULTIPLE, b, n, d)
    one[0] = 1
    if single_chunk:
        return torch.cat([inputs, one]), None
    added = (transition.response.flip(1) @ inputs.reshape(chunk, -1)).view(q, b, n, d)
    if m is None and not use_sequential_scan(x.device):
        after = parallel_scan(added.transpose(1, 2).flatten(2), transition.a_pow_chunk).view(q, n, b, d).transpose(1, 2)
        return torch.cat([inputs, F.pad(after[:, :, :-1], (0, 0, 1, 0)), one]), after[:, :, -1].flatten(1).double()
    m = x.new_zeros(q, b * d, dtype=torch.float64) if m is None else m
    memories = list[Tensor]()
    for i in range(n):
        memories.append(m.to(x.dtype).view(q, b, d))
        m = torch.addmm(added[:, :, i].flatten(1).double(), transition.a_pow_chunk, m)
    return torch.cat([inputs, torch.stack(memories, 2), one]), m


def _chunk_features_backward(dz: Float[Tensor, "F B N D"], transition: ChunkTransition, t: int) -> Float[Tensor, "B T D"]:
    """Gradient of x from d z."""
    order, chunk = transition.response.shape
    b, n, d = dz.shape[1:]
    dx = dz[:chunk]
    if len(transition.a_powers):
        memories = dz[chunk : chunk + order]
        after = torch.zeros_like(memories)  # gradient of the memory after each chunk
        if use_sequential_scan(dz.device):
            m = dz.new_zeros(order, b * d, dtype=torch.float64)
            for i in reversed(range(n)):
                after[:, :, i] = m.view(order, b, d)
                m = torch.addmm(memories[:, :, i].flatten(1).double(), transition.a_pow_chunk.T, m)
        else:
            reverse = memories.flip(2).transpose(1, 2).flatten(2)
            later = parallel_scan(reverse, transition.a_pow_chunk, transpose=True).view(order, n, b, d)
            after[:, :, :-1] = later[:, :-1].transpose(1, 2).flip(2)
        dx = dx + (transition.response.flip(1).T @ after.flatten(1)).view_as(dx)
    return dx.permute(1, 2, 0, 3).flatten(1, 2)[:, :t]


class _FusedLMU(torch.autograd.Function):
    """The output is (B N, C, D): `fused_lmu` makes its view, since autograd refuses changes in place of one made here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Tensor, bias: Tensor, p: Tensor, config: ChunkedConfig) -> Tensor:
        d, transition, block_chunks = x.shape[2], config.transition, config.block_chunks
        dtype = transition.response.dtype
        z = chunk_features(x.to(dtype), transition, single_chunk=config.single_chunk)[0].to(config.dtype)
        w = chunk_weights(projection.to(dtype), bias.to(dtype), transition, config.single_chunk).to(config.dtype)
        columns, width = z.flatten(1), block_chunks * d
        out = z.new_empty(columns.shape[1] // d, transition.chunk, d)
        saved = list[Tensor]()
        for i, block in enumerate(columns.split(width, 1)):
            pre = w @ block
            implicit_attention.forward(pre, p, out[i * block_chunks : (i + 1) * block_chunks], config.score_scale)
            if config.keep_preactivations:
                saved.append(pre)
        ctx.save_for_backward(z, w, p, *saved)
        ctx.config, ctx.length, ctx.dtypes = config, x.shape[1], (x.dtype, projection.dtype, bias.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, w, p, *saved = ctx.saved_tensors
        transition, block_chunks = ctx.config.transition, ctx.config.block_chunks
        d, dtype = z.shape[3], transition.response.dtype
        dout = dout.contiguous()
        columns, width = z.flatten(1), block_chunks * d
        dz, dw, dp = torch.empty_like(columns), w.new_zeros(w.shape, dtype=dtype), p.new_zeros(p.shape, dtype=dtype)
        for i, block in enumerate(columns.split(width, 1)):
            pre = implicit_attention.overwritable(saved[i]) if saved else w @ block  # `backward` writes its gradient there
            block_dout = dout[i * block_chunks : (i + 1) * block_chunks]
            implicit_attention.backward(pre, p, block_dout, dp, ctx.config.score_scale)
            torch.mm(w.T, pre, out=dz[:, i * width : (i + 1) * width])
            if ctx.config.dtype == dtype:
                dw.addmm_(pre, block.T)
            else:
                dw += pre @ block.T
        dprojection, dbias = _chunk_weights_backward(dw, transition)
        dx = _chunk_features_backward(dz.view_as(z).to(dtype), transition, ctx.length)
        x_dtype, projection_dtype, bias_dtype = ctx.dtypes
        return dx.to(x_dtype), dprojection.to(projection_dtype), dbias.to(bias_dtype), dp.to(p.dtype), None


def fused_lmu(
    x: Float[Tensor, "B T D"],
    projection: Float[Tensor, "K Q"],
    bias: Float[Tensor, "K"],
    p: Float[Tensor, "R"],
    config: ChunkedConfig,
) -> Float[Tensor, "B T D"]:
    """The LMU of whole sequences, with `projection` in units of the memory's row scale.

    On a GPU no operation waits for a value, so that a CUDA graph can capture it after a first call has computed the transition
    and compiled the attention kernel.
    """
    out = _FusedLMU.apply(x, projection, bias, p, config)
    return out.view(len(x), -1, x.shape[2])[:, : x.shape[1]].to(x.dtype)
