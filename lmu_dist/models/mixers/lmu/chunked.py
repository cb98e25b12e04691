"""The LMU operator in chunks: matrix products in place of Fourier transforms, one block of tokens at a time.

What a chunk's tokens read depends on its own C inputs (a Toeplitz product) and on the memory before it: together one product
W z with z = [inputs; memory; 1], for all channels at once. Exact, and O(T): the memory goes from chunk to chunk by Abar^C.
`readings` gives what memory_readings gives; `attended` lets no reading out: they go from the product to the attention block by
block, and the way back makes them again. Called by lmu.

Legend: B batch, T time, D width, Q order, R reduced order, K = 3R readings; C tokens of a chunk, N chunks, F = C + Q + 1.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lmu_dist.models.accounting import chunk_tokens
from lmu_dist.models.kernels import reader
from lmu_dist.models.mixers.lmu import legendre
from lmu_dist.models.precision import product_dtype

BLOCK = 2**21  # readings of a block: 8 MB in float32, near the processor
DEVICE_BLOCK = 2**27  # on a GPU, whose caches are too small to aim at: work enough that its launch costs nothing


@dataclass(frozen=True)
class Steps:
    """What C tokens do to a memory that is held in units of its rows' deviations: powers (C, Q, Q) are Abar .. Abar^C, response
    (Q, C) is Bbar, Abar Bbar ..; hop is Abar^C in float64, since a recurrence piles up what it rounds. Where there is one
    chunk only no memory is carried, and there are no powers, which would take gigabytes."""

    powers: Tensor
    response: Tensor
    hop: Tensor

    @property
    def chunk(self) -> int:
        """C."""
        return self.response.shape[1]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept serves training too
def steps(order: int, theta_tokens: float, chunk: int, dtype: torch.dtype, device: torch.device, single: bool = False) -> Steps:
    """Made in float64 and cast last."""
    a, b = legendre.discrete(order, theta_tokens)
    scale = legendre.row_scale(order, theta_tokens)
    a, b = torch.from_numpy(a / scale[:, None] * scale), torch.from_numpy(b / scale)
    response = [b]
    for _ in range(chunk - 1):
        response.append(a @ response[-1])
    powers = a.new_empty(0 if single else chunk, order, order)
    for i in range(len(powers)):
        powers[i] = powers[i - 1] @ a if i else a
    return Steps(powers.to(device, dtype), torch.stack(response, 1).to(device, dtype), powers[-1:].sum(0).to(device))


class Plan(NamedTuple):
    """How the operator runs: the steps of its chunks; whether there is one chunk only, so that no memory is carried; the
    precision of products; chunks of a block; whether readings are kept for the way back, as pays on a CPU (accounting)."""

    steps: Steps
    single: bool
    dtype: torch.dtype
    block: int
    keep: bool


def plan(x: Float[Tensor, "B T D"], n_readings: int, order: int, theta_tokens: float) -> Plan:
    """The plan for a whole sequence of this shape."""
    n_rows, length, width = x.shape
    chunk = chunk_tokens(order, n_readings, width, length, n_rows)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = product_dtype(x.dtype, x.device)
    at_once = DEVICE_BLOCK if reader.implementation(dtype, x.device, n_readings // 3) == "triton" else BLOCK
    block = max(1, at_once // (chunk * n_readings * width))
    single = chunk >= length
    made = steps(order, theta_tokens, chunk, exact, x.device, single)
    return Plan(made, single, dtype, block, keep=x.device.type == "cpu")


def weights(reading: Float[Tensor, "K Q"], bias: Float[Tensor, "K"], s: Steps, single: bool = False) -> Float[Tensor, "CK F"]:
    """W, from a chunk's features to the readings of its tokens."""
    kernel = F.pad((reading @ s.response).flip(1), (0, s.chunk - 1))  # (K, 2C - 1): the longest lag first, then zeros
    toeplitz = kernel.unfold(1, s.chunk, 1).flip(1).transpose(0, 1)  # (C, K, C)
    recalled = [] if single else [reading @ s.powers]
    everywhere = bias.expand(s.chunk, len(bias))[..., None]
    return torch.cat([toeplitz, *recalled, everywhere], 2).flatten(0, 1)


def _weights_back(dw: Float[Tensor, "CK F"], s: Steps) -> tuple[Float[Tensor, "K Q"], Float[Tensor, "K"]]:
    """From d W to d reading and d bias."""
    chunk = s.chunk
    dw = dw.unflatten(0, (chunk, -1))
    toeplitz, recalled, everywhere = dw[..., :chunk], dw[..., chunk:-1], dw[..., -1]
    # Rows one element longer than they are, read as rows that are not: diagonals have become columns.
    skewed = F.pad(toeplitz.transpose(0, 1).flip(1), (0, chunk)).flatten(1)[:, :-chunk].unflatten(1, (chunk, 2 * chunk - 1))
    dreading = skewed.sum(1)[:, :chunk].flip(1) @ s.response.T
    if recalled.shape[2]:
        dreading += torch.einsum("ckr,cqr->kq", recalled, s.powers)
    return dreading, everywhere.sum(0)


def one_by_one(device: torch.device) -> bool:
    """Whether a memory is carried from chunk to chunk, and not by `carried`: where many small products cost no launches."""
    return device.type == "cpu"


@lru_cache(maxsize=128)
def _square(hop: Tensor) -> Tensor:
    return hop @ hop


def carried(added: Float[Tensor, "Q N W"], hop: Float[Tensor, "Q Q"], back: bool = False) -> Float[Tensor, "Q N W"]:
    """The memory after every chunk, m_i = hop m_(i-1) + added_i (`back`: hop^T), in 2 log N products: pairs of chunks are
    carried by hop^2, and so on.

    Twice the arithmetic of a loop. An error passes log N products, not N, so that the precision of `added` will do where a loop
    needs float64, which most GPUs are slow at; the powers of hop are float64 all the same, and made once.
    """
    n = added.shape[1]
    if n == 1:
        return added
    by = (hop.T if back else hop).to(added.dtype)

    def moved(m: Tensor) -> Tensor:
        return (by @ m.flatten(1)).view_as(m)

    ends = carried(added[:, 1::2] + moved(added[:, : n - 1 : 2]), _square(hop), back)  # after chunks 1, 3, 5 ..
    after = torch.empty_like(added)
    after[:, 0], after[:, 1::2] = added[:, 0], ends
    after[:, 2::2] = added[:, 2::2] + moved(ends[:, : (n - 1) // 2])
    return after


def features(
    x: Float[Tensor, "B T D"], s: Steps, m: Float[Tensor, "Q BD"] | None = None, single: bool = False
) -> tuple[Float[Tensor, "F B N D"], Float[Tensor, "Q BD"] | None]:
    """z of every chunk, and the memory after the last."""
    (b, t, d), (q, chunk) = x.shape, s.response.shape
    n = -(-t // chunk)
    inputs = F.pad(x, (0, 0, 0, n * chunk - t)).unflatten(1, (n, chunk)).permute(2, 0, 1, 3)
    one = x.new_ones(1, b, n, d)
    if single:
        return torch.cat([inputs, one]), None
    added = (s.response.flip(1) @ inputs.reshape(chunk, -1)).view(q, b, n, d)
    if m is None and not one_by_one(x.device):
        after = carried(added.transpose(1, 2).flatten(2), s.hop).view(q, n, b, d).transpose(1, 2)
        return torch.cat([inputs, F.pad(after[:, :, :-1], (0, 0, 1, 0)), one]), after[:, :, -1].flatten(1).double()
    m = x.new_zeros(q, b * d, dtype=torch.float64) if m is None else m
    memories = list[Tensor]()
    for i in range(n):
        memories.append(m.to(x.dtype).view(q, b, d))
        m = torch.addmm(added[:, :, i].flatten(1).double(), s.hop, m)
    return torch.cat([inputs, torch.stack(memories, 2), one]), m


def _features_back(dz: Float[Tensor, "F B N D"], s: Steps, t: int) -> Float[Tensor, "B T D"]:
    """From d z to d x."""
    order, chunk = s.response.shape
    b, n, d = dz.shape[1:]
    dx, memories = dz[:chunk], dz[chunk:-1]
    if len(memories):
        after = torch.zeros_like(memories)  # gradient of the memory at a chunk's end
        if one_by_one(dz.device):
            m = dz.new_zeros(order, b * d, dtype=torch.float64)
            for i in reversed(range(n)):
                after[:, :, i] = m.view(order, b, d)
                m = torch.addmm(memories[:, :, i].flatten(1).double(), s.hop.T, m)
        else:
            later = carried(memories.flip(2).transpose(1, 2).flatten(2), s.hop, back=True).view(order, n, b, d)
            after[:, :, :-1] = later[:, :-1].transpose(1, 2).flip(2)
        dx = dx + (s.response.flip(1).T @ after.flatten(1)).view_as(dx)
    return dx.permute(1, 2, 0, 3).flatten(1, 2)[:, :t]


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reading: Tensor, bias: Tensor, p: Tensor, plan: Plan) -> Tensor:
        d, s = x.shape[2], plan.steps
        exact = s.response.dtype
        z = features(x.to(exact), s, single=plan.single)[0].to(plan.dtype)
        w = weights(reading.to(exact), bias.to(exact), s, plan.single).to(plan.dtype)
        flat, width = z.flatten(1), plan.block * d
        out = z.new_empty(flat.shape[1] // d, s.chunk, d)
        kept = list[Tensor]()
        for i, block in enumerate(flat.split(width, 1)):
            pre = w @ block
            reader.read(pre, p, out[i * plan.block : (i + 1) * plan.block])
            if plan.keep:
                kept.append(pre)
        ctx.save_for_backward(z, w, p, *kept)
        ctx.plan, ctx.length, ctx.dtypes = plan, x.shape[1], (x.dtype, reading.dtype, bias.dtype)
        return out.view(len(x), -1, d)[:, : x.shape[1]].to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, w, p, *kept = ctx.saved_tensors
        plan, s = ctx.plan, ctx.plan.steps
        d, exact = z.shape[3], s.response.dtype
        padding = z.shape[2] * s.chunk - ctx.length
        dout = F.pad(dout.to(plan.dtype), (0, 0, 0, padding)).reshape(-1, s.chunk, d).contiguous()
        flat, width = z.flatten(1), plan.block * d
        dz, dw, dp = torch.empty_like(flat), w.new_zeros(w.shape, dtype=exact), p.new_zeros(p.shape, dtype=exact)
        for i, block in enumerate(flat.split(width, 1)):
            pre = kept[i] if kept else w @ block
            # Its gradient is written over it, which autograd cannot see, and it must not be used a second time.
            torch.autograd.graph.increment_version(pre)
            reader.read_back(pre, p, dout[i * plan.block : (i + 1) * plan.block], dp)
            torch.mm(w.T, pre, out=dz[:, i * width : (i + 1) * width])
            if plan.dtype == exact:
                dw.addmm_(pre, block.T)
            else:
                dw += pre @ block.T
        dreading, dbias = _weights_back(dw, s)
        dx = _features_back(dz.view_as(z).to(exact), s, ctx.length)
        of_x, of_reading, of_bias = ctx.dtypes
        return dx.to(of_x), dreading.to(of_reading), dbias.to(of_bias), dp.to(p.dtype), None


def attended(
    x: Float[Tensor, "B T D"], reading: Float[Tensor, "K Q"], bias: Float[Tensor, "K"], p: Float[Tensor, "R"], plan: Plan
) -> Float[Tensor, "B T D"]:
    """Implicit attention to the memory at every token; `reading` in units of the memory's deviations.

    On a GPU no step of it waits for a value, so that a CUDA graph can hold it, once a first call has made the plan's steps and
    compiled the reader.
    """
    return _Attended.apply(x, reading, bias, p, plan)
