"""The LMU mixer: one Legendre memory per channel, read by implicit self-attention (arXiv 2110.02402, eq. 1-11, A.1).

(B, T, D) in, (B, T, D) out, causal. Legend: B batch, T time, D width, Q order, R reduced order q', K = 3R readings.
`mixed` is all of it in any of four forms, `memory_readings` and `implicit_attention` its halves; lm builds the sublayer LMU.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmu_dist.models.kernels import reader
from lmu_dist.models.mixers.lmu import chunked, fourier, legendre
from lmu_dist.models.precision import product_dtype

Form = Literal["recurrent", "fft", "chunked", "fused"]
FORMS: tuple[Form, ...] = get_args(Form)
CHUNK = 32  # tokens, where a memory is carried in any case: near the fewest operations for q from 60 to 1,000 (accounting)


@dataclass(frozen=True)
class Memory:
    """The frozen memory on a device: a_bar (Q, Q), b_bar (Q,), impulse response h (Q, T), row scale (Q,)."""

    a_bar: Tensor
    b_bar: Tensor
    h: Tensor
    row_scale: Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training too
def memory(order: int, theta_tokens: float, length: int, dtype: torch.dtype, device: torch.device) -> Memory:
    """Tensors of one memory, made in float64 and cast last. Not buffers: no precision setting can round them twice."""
    arrays = (
        *legendre.discrete(order, theta_tokens),
        legendre.impulse_response(order, theta_tokens, length),
        legendre.row_scale(order, theta_tokens),
    )
    return Memory(*(torch.from_numpy(a).to(device, dtype) for a in arrays))


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the memory under activations of `dtype`: float64 for float64, else float32 (bfloat16 has no FFT)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def convolve(x: Float[Tensor, "B T D"], kernels: Float[Tensor, "K T"]) -> Float[Tensor, "B T K D"]:
    """Causal convolution of every channel with every kernel, y_t = sum_{j<=t} k_{t-j} x_j, by FFT padded to 2T (eq. 7)."""
    length = x.shape[1]
    n_fft = 2 * length
    spectrum = torch.fft.rfft(x.transpose(1, 2), n_fft)  # (B, D, F)
    response = torch.fft.rfft(kernels, n_fft)  # (K, F)
    y = torch.fft.irfft(response[None, :, None] * spectrum[:, None], n_fft)[..., :length]  # (B, K, D, T)
    return y.permute(0, 3, 1, 2)


def memory_readings(
    x: Float[Tensor, "B T D"],
    reading: Float[Tensor, "K Q"],
    theta_tokens: float,
    state: Float[Tensor, "B Q D"] | None = None,
    form: Form = "fft",
) -> tuple[Float[Tensor, "B T K D"], Float[Tensor, "B Q D"] | None]:
    """Linear readings L M_t of the memory at every token; with a given state, also the state after the last token.

    recurrent: M_t = Abar M_{t-1} + Bbar x_t, token by token (eq. 1): the reference, and the way to generate.
    fft: (L H) * x, the reading folded into the impulse response (appendix A.1), K convolutions in place of Q.
    chunked: matrix products over chunks of tokens (models/mixers/lmu/chunked).
    All carry a state from call to call exactly: the fft form adds L Abar^t M_0 and closes with
    M_T = sum_j Abar^(T-j) Bbar x_j + Abar^T M_0. Without a state (a row from its start) None comes back for it.
    States are float64, since a recurrence piles up what it rounds; convolutions run in float32, or float64 if x is.
    """
    length, order = x.shape[1], reading.shape[1]
    dtype = memory_dtype(x.dtype)
    x, reading = x.to(dtype), reading.to(dtype)
    if form == "recurrent":
        exact = memory(order, theta_tokens, 1, torch.float64, x.device)
        m = x.new_zeros(x.shape[0], order, x.shape[2], dtype=torch.float64) if state is None else state
        readings = []
        for t in range(length):
            m = exact.a_bar @ m + exact.b_bar[:, None] * x[:, t, None]
            readings.append(reading @ m.to(dtype))
        return torch.stack(readings, dim=1), None if state is None else m
    if form == "chunked":
        return _chunked_readings(x, reading, theta_tokens, state)
    y = convolve(x, reading @ memory(order, theta_tokens, length, dtype, x.device).h)
    if state is None:
        return y, None
    exact = memory(order, theta_tokens, length, torch.float64, x.device)
    powers, power = [], reading.double()
    for _ in range(length):
        power = power @ exact.a_bar
        powers.append(power)
    y = y + torch.einsum("tkq,bqd->btkd", torch.stack(powers), state).to(dtype)
    return y, torch.linalg.matrix_power(exact.a_bar, length) @ state + exact.h.flip(1) @ x.double()


def _chunked_readings(
    x: Float[Tensor, "B T D"], reading: Float[Tensor, "K Q"], theta_tokens: float, state: Float[Tensor, "B Q D"] | None
) -> tuple[Float[Tensor, "B T K D"], Float[Tensor, "B Q D"] | None]:
    (b, t, d), (k, q) = x.shape, reading.shape
    scale = memory(q, theta_tokens, 1, torch.float64, x.device).row_scale
    # Whole chunks, then what is left: the memory after the last token is asked for, not after the end of a chunk.
    chunk = min(t, CHUNK)
    m = None if state is None else (state / scale[:, None]).transpose(0, 1).flatten(1)
    parts = list[Tensor]()
    for piece in x.split([t - t % chunk, t % chunk] if t % chunk else [t], dim=1):
        s = chunked.steps(q, theta_tokens, min(chunk, piece.shape[1]), x.dtype, x.device)
        z, m = chunked.features(piece, s, m)
        w = chunked.weights(reading * scale.to(x.dtype), x.new_zeros(k), s)
        y = (w @ z.flatten(1)).view(s.chunk, k, b, -1, d)
        parts.append(y.permute(2, 3, 0, 1, 4).flatten(1, 2))
    assert m is not None
    end = None if state is None else m.view(q, b, d).transpose(0, 1) * scale[:, None]
    return torch.cat(parts, 1), end


def implicit_attention(
    readings: Float[Tensor, "B T K D"], bias: Float[Tensor, "K"], p: Float[Tensor, "R"], scale: float = 1.0
) -> Float[Tensor, "B T D"]:
    """Attention over the rows of one token's memory, never across tokens: p softmax(scale QK^T) V (eq. 8-10).

    Q, K, V = gelu(L1 M + b1), gelu(L2 M + b2), gelu(L3 M + b3) stand one after the other in `readings`. p meets the
    weights before V does, which saves the (R, R) x (R, D) product. Scale 1 is the paper's.
    """
    return reader.attend(readings + bias[:, None], p, scale)


def best_form(dtype: torch.dtype, device: torch.device) -> Form:
    """What a whole sequence takes if not told otherwise: the fused form wherever its reader was compiled."""
    return "chunked" if reader.implementation(dtype, device) == "torch" else "fused"


def mixed(
    x: Float[Tensor, "B T D"],
    reading: Float[Tensor, "K Q"],
    bias: Float[Tensor, "K"],
    p: Float[Tensor, "R"],
    theta_tokens: float,
    form: Form | None = None,
) -> Float[Tensor, "B T D"]:
    """A whole sequence from an empty memory, in the form asked for or the one that is best here; (L1, L2, L3) of eq. 8 is
    `reading` over the memory's row scale.

    recurrent, fft, chunked: `implicit_attention` to `memory_readings`, which autograd keeps. fused: one operator, whose way
    back is written by hand, by transforms or by products of chunks (models/mixers/lmu/fourier, models/mixers/lmu/chunked).

    Error against float64, of the norm: in float32 below 1e-6; in bfloat16 below 1e-2, and 2e-2 for gradients, as sums are
    taken in float32 (tests/models/test_lmu.py).
    """
    form = form or best_form(x.dtype, x.device)
    if form == "fused" and not fourier.serves(x.dtype, x.device):
        k, q = reading.shape
        return chunked.attended(x, reading, bias, p, chunked.plan(x, k, q, theta_tokens))
    papers = in_papers_basis(reading, theta_tokens)
    if form == "fused":
        h = memory(reading.shape[1], theta_tokens, x.shape[1], papers.dtype, x.device).h
        return fourier.attended(x, papers, bias, p, theta_tokens, h)
    readings, _ = memory_readings(x, papers, theta_tokens, form=form)
    return implicit_attention(readings.to(x.dtype), bias, p)


def in_papers_basis(reading: Float[Tensor, "K Q"], theta_tokens: float) -> Float[Tensor, "K Q"]:
    """L1, L2, L3 of eq. 8 stacked, of a reading in units of the memory's row scale."""
    dtype = memory_dtype(reading.dtype)
    return reading.to(dtype) / memory(reading.shape[1], theta_tokens, 1, dtype, reading.device).row_scale


def operator(form: Form | None, dtype: torch.dtype, device: torch.device, rows: int) -> str:
    """What `mixed` takes for q' = `rows`, for the record of a run: the form, and how the fused one is made."""
    form = form or best_form(dtype, device)
    if form != "fused":
        return form
    if fourier.serves(dtype, device):
        return "fused: transforms, c++"
    return f"fused: products, {reader.implementation(product_dtype(dtype, device), device, rows)}"


class LMU(nn.Module):
    """Legendre memory with implicit self-attention. Trained: L1, L2, L3 (R, Q) with biases (R,), and p (R,).

    `form` is what a whole sequence takes; None: what is best where it runs.

    `reading` is held in units of the memory's row scale, so that white noise of unit variance gives pre-activations of
    unit variance at the start and no order is trained at another rate; the paper's L is `reading_matrix`.
    """

    def __init__(self, order: int, reduced_order: int, theta_tokens: float, form: Form | None = None) -> None:
        super().__init__()
        self.theta_tokens = theta_tokens
        self.form: Form | None = form
        self.reading = nn.Parameter(torch.randn(3 * reduced_order, order) / math.sqrt(order))
        self.bias = nn.Parameter(torch.zeros(3 * reduced_order))
        self.p = nn.Parameter(torch.randn(reduced_order) / math.sqrt(reduced_order))

    @property
    def reading_matrix(self) -> Float[Tensor, "K Q"]:
        """L1, L2, L3 of eq. 8 stacked, in the paper's basis."""
        return in_papers_basis(self.reading, self.theta_tokens)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """A whole sequence from an empty memory."""
        return mixed(x, self.reading, self.bias, self.p, self.theta_tokens, self.form)

    def advance(self, x: Float[Tensor, "B T D"], state: Tensor | None) -> tuple[Float[Tensor, "B T D"], Tensor]:
        """The next chunk of a sequence: outputs, and the memory (B, Q, D) to hand to the chunk after it."""
        if state is None:
            state = x.new_zeros(x.shape[0], self.reading.shape[1], x.shape[2], dtype=torch.float64)
        form: Form = "recurrent" if x.shape[1] == 1 else "chunked"
        readings, state = memory_readings(x, self.reading_matrix, self.theta_tokens, state, form)
        assert state is not None
        return implicit_attention(readings.to(x.dtype), self.bias, self.p), state
