"""The LMU mixer: one Legendre memory per channel and implicit self-attention over its rows (arXiv 2110.02402, eq. 1-11, A.1).

(B, T, D) in, (B, T, D) out, causal. Legend: B batch, T time, D width, Q order q, R reduced order q', K = 3R rows of the
projection to Q, K, V. `lmu_mixer` computes the whole operator in one of four forms; `projected_memory` and `attend_to_memory`
are its two halves. The families build the sublayer LMU.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lmu_dist.array_types import Float
from lmu_dist.models.kernels import implicit_attention
from lmu_dist.models.mixers.lmu import checks, chunked, fourier, legendre
from lmu_dist.models.precision import no_autocast, product_dtype
from lmu_dist.models.products import uses_float32

Form = Literal["recurrent", "fft", "chunked", "fused"]
FORMS: tuple[Form, ...] = get_args(Form)
# Of the chunked form, which returns the state after the last token. Near the fewest operations for q from 60 to 1,000.
CHUNK_TOKENS = 32


@dataclass(frozen=True)
class MemoryMatrices:
    """Constants of the frozen memory on a device: a_bar (Q, Q), b_bar (Q,), row scale (Q,)."""

    a_bar: Tensor
    b_bar: Tensor
    row_scale: Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training uses cached tensors too, and autograd refuses tensors made in inference mode
def memory_matrices(order: int, theta_tokens: float, dtype: torch.dtype, device: torch.device) -> MemoryMatrices:
    """Constants of one memory, computed in float64 and cast last. Not buffers: no precision setting may cast them again."""
    arrays = (*legendre.discrete_matrices(order, theta_tokens), legendre.row_scale(order, theta_tokens))
    return MemoryMatrices(*(torch.from_numpy(a).to(device, dtype) for a in arrays))


def impulse_response(
    order: int, theta_tokens: float, length: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "Q T"]:
    """The memory's first `length` outputs after an input of 1, cast last. Kept by powers of two: sequences differ in length."""
    return _impulse_response(order, theta_tokens, 2 ** math.ceil(math.log2(length)), dtype, device)[:, :length]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _impulse_response(
    order: int, theta_tokens: float, length: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "Q T"]:
    return torch.from_numpy(legendre.impulse_response(order, theta_tokens, length)).to(device, dtype)


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the memory under activations of `dtype`: float64 for float64, else float32 (bfloat16 has no FFT)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def convolve(x: Float[Tensor, "B T D"], kernels: Float[Tensor, "K T"]) -> Float[Tensor, "B T K D"]:
    """Causal convolution of every channel with every kernel, y_t = sum_{j<=t} k_{t-j} x_j, by FFT padded to 2T (eq. 7)."""
    length = x.shape[1]
    if not x.numel():  # which transforms refuse
        return torch.einsum("btd,kt->btkd", x, kernels)
    n_fft = 2 * length
    spectrum = torch.fft.rfft(x.transpose(1, 2), n_fft)  # (B, D, F)
    response = torch.fft.rfft(kernels, n_fft)  # (K, F)
    y = torch.fft.irfft(response[None, :, None] * spectrum[:, None], n_fft)[..., :length]  # (B, K, D, T)
    return y.permute(0, 3, 1, 2)


def projected_memory(
    x: Float[Tensor, "B T D"],
    projection: Float[Tensor, "K Q"],
    theta_tokens: float,
    state: Float[Tensor, "B Q D"] | None = None,
    form: Form = "fft",
) -> tuple[Float[Tensor, "B T K D"], Float[Tensor, "B Q D"] | None]:
    """Projected memory L M_t at every token, and the state M_T after the last token if a state is given, else None.

    recurrent: M_t = Abar M_{t-1} + Bbar x_t, token by token (eq. 1). This is the reference, and is used to generate text.
    fft: (L H) * x, with the projection folded into the impulse response (appendix A.1): K convolutions in place of Q.
    chunked: matrix products over chunks of tokens (models/mixers/lmu/chunked).

    Every form passes a state from call to call exactly. The fft form adds L Abar^t M_0 and computes
    M_T = sum_j Abar^(T-j) Bbar x_j + Abar^T M_0. Without a state the sequence starts from an empty memory. States are float64,
    since a recurrence accumulates rounding errors. Convolutions run in float32, or in float64 if x is float64.
    """
    length, order = x.shape[1], projection.shape[1]
    dtype = memory_dtype(x.dtype)
    x, projection = x.to(dtype), projection.to(dtype)
    if form == "recurrent":
        exact = memory_matrices(order, theta_tokens, torch.float64, x.device)
        m = x.new_zeros(x.shape[0], order, x.shape[2], dtype=torch.float64) if state is None else state
        projected = []
        for t in range(length):
            m = exact.a_bar @ m + exact.b_bar[:, None] * x[:, t, None]
            projected.append(projection @ m.to(dtype))
        return torch.stack(projected, dim=1), None if state is None else m
    if form == "chunked":
        return _projected_memory_chunked(x, projection, theta_tokens, state)
    y = convolve(x, projection @ impulse_response(order, theta_tokens, length, dtype, x.device))
    if state is None:
        return y, None
    a_bar = memory_matrices(order, theta_tokens, torch.float64, x.device).a_bar
    response = impulse_response(order, theta_tokens, length, torch.float64, x.device)
    powers, power = [], projection.double()
    for _ in range(length):
        power = power @ a_bar
        powers.append(power)
    y = y + torch.einsum("tkq,bqd->btkd", torch.stack(powers), state).to(dtype)
    return y, torch.linalg.matrix_power(a_bar, length) @ state + response.flip(1) @ x.double()


def _projected_memory_chunked(
    x: Float[Tensor, "B T D"], projection: Float[Tensor, "K Q"], theta_tokens: float, state: Float[Tensor, "B Q D"] | None
) -> tuple[Float[Tensor, "B T K D"], Float[Tensor, "B Q D"] | None]:
    (b, t, d), (k, q) = x.shape, projection.shape
    scale = memory_matrices(q, theta_tokens, torch.float64, x.device).row_scale
    m = None if state is None else (state / scale[:, None]).transpose(0, 1).flatten(1)
    parts = list[Tensor]()
    # Whole chunks first. The state must end at the last token, so the rest are shorter chunks: their lengths are powers of two,
    # lest matrices of every length are kept.
    rest = t % CHUNK_TOKENS
    lengths = [t - rest, *(2**i for i in reversed(range(rest.bit_length())) if rest & 2**i)]
    for piece in x.split([length for length in lengths if length], dim=1):
        transition = chunked.chunk_transition(q, theta_tokens, min(CHUNK_TOKENS, piece.shape[1]), x.dtype, x.device)
        z, m = chunked.chunk_features(piece, transition, m)
        w = chunked.chunk_weights(projection * scale.to(x.dtype), x.new_zeros(k), transition)
        y = (w @ z.flatten(1)).view(transition.chunk, k, b, z.shape[2], d)
        parts.append(y.permute(2, 3, 0, 1, 4).flatten(1, 2))
    assert m is not None
    end = None if state is None else m.view(q, b, d).transpose(0, 1) * scale[:, None]
    return torch.cat(parts, 1), end


def attend_to_memory(
    projected: Float[Tensor, "B T K D"], bias: Float[Tensor, "K"], p: Float[Tensor, "R"], scale: float = 1.0
) -> Float[Tensor, "B T D"]:
    """Implicit self-attention over the rows of one token's memory, never across tokens: p softmax(scale QK^T) V (eq. 8-10).

    `projected` stacks L1 M, L2 M, L3 M, and Q, K, V = gelu(L1 M + b1), gelu(L2 M + b2), gelu(L3 M + b3). p is multiplied with
    the attention weights before V, which saves the (R, R) x (R, D) product. Scale 1 is the paper's. The output has the
    precision of `projected`, also where that of the parameters is another, as under autocast.
    """
    pre = projected + bias[:, None]
    dtype = torch.float32 if uses_float32(pre) else pre.dtype
    return implicit_attention.attend(pre.to(dtype), p.to(dtype), scale).to(projected.dtype)


def default_form(dtype: torch.dtype, device: torch.device) -> Form:
    """The form for whole sequences if none is given: fused wherever a compiled attention kernel is available, else chunked."""
    return "chunked" if implicit_attention.implementation(dtype, device) == "torch" else "fused"


def lmu_mixer(
    x: Float[Tensor, "B T D"],
    projection: Float[Tensor, "K Q"],
    bias: Float[Tensor, "K"],
    p: Float[Tensor, "R"],
    theta_tokens: float,
    form: Form | None = None,
    score_scale: float = 1.0,
) -> Float[Tensor, "B T D"]:
    """The LMU of a whole sequence from an empty memory, in the given form or the device's default form.

    `projection` stacks L1, L2, L3 of eq. 8 in units of the memory's row scale (see `to_paper_basis`). The paper's scores have
    the factor 1.

    recurrent, fft, chunked: `attend_to_memory` of `projected_memory`; autograd stores the intermediates.
    fused: one operator with a hand-written backward pass, by Fourier transforms or by chunked products
    (models/mixers/lmu/fourier, models/mixers/lmu/chunked).

    Relative error of the norm against float64: below 1e-6 in float32; below 1e-2 in bfloat16, and below 2e-2 for its gradients,
    since sums run in float32 (tests/models/test_lmu.py).
    """
    form = form or default_form(x.dtype, x.device)
    if not x.numel():
        form = "fft"  # the only one that takes an empty batch everywhere
    if form == "fused" and not fourier.is_supported(x.dtype, x.device):
        k, q = projection.shape
        return chunked.fused_lmu(x, projection, bias, p, chunked.chunked_config(x, k, q, theta_tokens, score_scale))
    paper_projection = to_paper_basis(projection, theta_tokens)
    if form == "fused":
        response = impulse_response(projection.shape[1], theta_tokens, x.shape[1], paper_projection.dtype, x.device)
        return fourier.fused_lmu(x, paper_projection, bias, p, theta_tokens, response, score_scale)
    projected, _ = projected_memory(x, paper_projection, theta_tokens, form=form)
    return attend_to_memory(projected.to(x.dtype), bias, p, score_scale)


def to_paper_basis(projection: Float[Tensor, "K Q"], theta_tokens: float) -> Float[Tensor, "K Q"]:
    """L1, L2, L3 of eq. 8, stacked, from a projection in units of the memory's row scale."""
    dtype = memory_dtype(projection.dtype)
    return projection.to(dtype) / memory_matrices(projection.shape[1], theta_tokens, dtype, projection.device).row_scale


def operator(form: Form | None, dtype: torch.dtype, device: torch.device, reduced_order: int) -> str:
    """Name of the implementation `lmu_mixer` uses: the form, and how the fused form is computed. The tag `lmu.operator`."""
    form = form or default_form(dtype, device)
    if form != "fused":
        return form
    if fourier.is_supported(dtype, device):
        return "fused: transforms, c++"
    return f"fused: products, {implicit_attention.implementation(product_dtype(dtype, device), device, reduced_order)}"


class LMU(nn.Module):
    """Legendre memory with implicit self-attention: a causal map of (B, T, D) to (B, T, D), for any B, T and D.

    order          number q of Legendre coefficients of each channel
    reduced_order  number q' of rows of Q, K and V, to which the coefficients are projected
    theta_tokens   length of the memory's sliding window
    form           the form for whole sequences (see `lmu_mixer`); None: the device's default form
    score_scale    factor of the scores; 1 in the paper

    Trained: L1, L2, L3 (R, Q) with biases (R,), and p (R,). The parameter `reading` is L in units of the memory's row scale; it
    has this name in checkpoints. White noise of unit variance thus gives pre-activations of unit variance at the start, and all
    orders train at the same rate. The paper's L is `projection_matrix`. Raises ValueError, also when it is called.
    """

    row_vectors = ("p",)  # multiplied with a matrix: its learning rate follows the length, as that of a matrix does its fan-in

    def __init__(
        self, order: int, reduced_order: int, theta_tokens: float, form: Form | None = None, score_scale: float = 1.0
    ) -> None:
        super().__init__()
        checks.check_settings(order=order, reduced_order=reduced_order, theta_tokens=theta_tokens)
        if form is not None and form not in FORMS:
            raise ValueError(f"form must be None or one of {', '.join(FORMS)}, not {form!r}")
        self.theta_tokens, self.score_scale = theta_tokens, score_scale
        self.form: Form | None = form
        self.reading = nn.Parameter(torch.randn(3 * reduced_order, order) / math.sqrt(order))
        self.bias = nn.Parameter(torch.zeros(3 * reduced_order))
        self.p = nn.Parameter(torch.randn(reduced_order) / math.sqrt(reduced_order))

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        rows, order = self.reading.shape
        return f"order={order}, reduced_order={rows // 3}, theta_tokens={self.theta_tokens}"

    @property
    def projection_matrix(self) -> Float[Tensor, "K Q"]:
        """L1, L2, L3 of eq. 8, stacked, in the paper's basis."""
        return to_paper_basis(self.reading, self.theta_tokens)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence from an empty memory."""
        checks.check_input(x)
        with no_autocast(x.device):
            return lmu_mixer(x, self.reading, self.bias, self.p, self.theta_tokens, self.form, self.score_scale)

    def advance(
        self, x: Float[Tensor, "B T D"], state: Float[Tensor, "B Q D"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B Q D"]]:
        """Outputs of the next chunk of tokens, and the memory after it, the state for the chunk that follows.

        The state is float64. None is the empty memory, with which a sequence starts. Never uses the fused form.
        """
        with no_autocast(x.device):
            projected, state = advance_memory(x, self.projection_matrix, self.theta_tokens, state)
            return self._attend(projected.to(x.dtype)), state

    def _attend(self, projected: Float[Tensor, "B T K D"]) -> Float[Tensor, "B T D"]:
        return attend_to_memory(projected, self.bias, self.p, self.score_scale)


def advance_memory(
    x: Float[Tensor, "B T D"],
    projection: Float[Tensor, "K Q"],
    theta_tokens: float,
    state: Float[Tensor, "B Q D"] | None = None,
) -> tuple[Float[Tensor, "B T K D"], Float[Tensor, "B Q D"]]:
    """Projected memory of the next chunk of tokens, and the memory after it. None: an empty memory. Raises ValueError."""
    checks.check_input(x)
    shape = (x.shape[0], projection.shape[1], x.shape[2])
    if state is None:
        state = x.new_zeros(shape, dtype=torch.float64)
    checks.check_state(state, shape)
    projected, state = projected_memory(x, projection, theta_tokens, state, "recurrent" if x.shape[1] == 1 else "chunked")
    assert state is not None
    return projected, state
