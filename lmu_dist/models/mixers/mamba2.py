"""Mamba-2, a state space model with scalar decays (arXiv 2405.21060, section 7): (B, T, D) in, (B, T, D) out.

Legend: B batch, T time, D width, H heads of P channels, N channels of the state, G groups of heads that share B and C, E = H P.
Built by families/mamba2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models.kernels import ssd as kernel
from lmu_dist.models.mixers import gpu_kernels, short_convolution, ssd
from lmu_dist.models.mixers.decay import draw_rates, draw_step_bias
from lmu_dist.models.mixers.gated_norm import GatedRMSNorm
from lmu_dist.models.mixers.short_convolution import ShortConvolution
from lmu_dist.models.precision import recurrence_dtype
from lmu_dist.models.products import Linear

State = tuple[Tensor, Tensor]  # the last inputs of the convolution, the states (B, G, N, H / G, P)


class Mamba2(nn.Module):
    """x, B, C = silu(conv(u W)), S_t and y_t of the state space, out(RMSNorm(y * silu(u W_gate))).

    A step dt_t = softplus(u W_dt + dt_bias) for every head, and a decay exp(-dt exp(A_log)). Names and initial values are those
    of the paper's code (state-spaces/mamba): exp(A_log) is uniform in 1 .. 16, softplus(dt_bias) log-uniform in 0.001 .. 0.1, D
    starts at 1. Unlike there the convolution has no bias. The norm is over all channels of a group. The recurrence runs in
    float32 under bf16.
    """

    def __init__(self, d_model: int, n_heads: int, head_width: int, d_state: int, n_groups: int = 1) -> None:
        super().__init__()
        self.n_heads, self.head_width, self.d_state, self.n_groups = n_heads, head_width, d_state, n_groups
        inner = n_heads * head_width
        self.xbc = Linear(d_model, inner + 2 * n_groups * d_state, bias=False)
        self.convolution = ShortConvolution(inner + 2 * n_groups * d_state)
        self.gate = Linear(d_model, inner, bias=False)
        self.step = Linear(d_model, n_heads, bias=False)
        self.A_log = nn.Parameter(draw_rates(n_heads, 1.0).log())
        self.dt_bias = nn.Parameter(draw_step_bias(n_heads))
        self.D = nn.Parameter(torch.ones(n_heads))
        self.norm = GatedRMSNorm(inner, n_groups, gate_first=True)
        self.out = Linear(inner, d_model, bias=False)

    def forward(self, u: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence from empty states."""
        inputs = self._inputs(u, self.convolution(self.xbc(u)))
        if gpu_kernels.is_supported("simple_gla", u.dtype, u.device, self.d_state):
            return self._output(u, gpu_kernels.state_space(*self._by_group(*inputs), u.dtype))
        return self._output(u, self._state_space(*inputs)[0])

    def advance(self, u: Float[Tensor, "B T D"], state: State | None) -> tuple[Float[Tensor, "B T D"], State]:
        """Outputs of the next chunk of tokens, and the state for the chunk that follows."""
        recent, states = state or (None, None)
        mixed, recent = self.convolution.advance(self.xbc(u), recent)
        inputs = self._inputs(u, mixed)
        if states is not None and u.shape[1] == 1:
            y, states = ssd.recurrent(*self._by_group(*inputs), states)
        else:
            y, states = self._state_space(*inputs, states)
        return self._output(u, y), (recent, states)

    def _inputs(self, u: Float[Tensor, "B T D"], mixed: Float[Tensor, "B T C"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, B and C side by side, steps, decay rates and skips of the state space."""
        dtype = recurrence_dtype(u.dtype)
        dt = F.softplus(self.step(u).to(dtype) + self.dt_bias.to(dtype))
        return mixed.to(dtype), dt, -self.A_log.to(dtype).exp(), self.D.to(dtype)

    def _by_group(
        self, packed: Tensor, dt: Tensor, rates: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arguments of mixers/ssd."""
        of_groups, groups = self.n_groups * self.d_state, (self.n_groups, -1)
        x, b, c = packed.split([self.n_heads * self.head_width, of_groups, of_groups], -1)
        return x.unflatten(-1, (self.n_heads, -1)), dt, rates, b.unflatten(-1, groups), c.unflatten(-1, groups), skip

    def _state_space(
        self, packed: Tensor, dt: Tensor, rates: Tensor, skip: Tensor, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if kernel.is_available(packed.dtype, packed.device):
            return kernel.state_space(packed, dt, rates, skip, (self.n_groups, self.d_state), states)
        return ssd.chunked(*self._by_group(packed, dt, rates, skip), states)

    def _output(self, u: Float[Tensor, "B T D"], y: Float[Tensor, "B T H P"]) -> Float[Tensor, "B T D"]:
        return self.out(self.norm(y.flatten(2), self.gate(u)))


def n_params(d_model: int, n_heads: int, head_width: int, d_state: int, n_groups: int) -> int:
    """Number of trainable parameters."""
    inner = n_heads * head_width
    channels = inner + 2 * n_groups * d_state
    return d_model * (channels + 2 * inner + n_heads) + short_convolution.n_params(channels) + 3 * n_heads + inner


def matmul_flops(d_model: int, n_heads: int, head_width: int, d_state: int, n_groups: int, length: int) -> float:
    """Forward FLOPs per token of the projections and of the chunked recurrence."""
    inner = n_heads * head_width
    projections = 2 * d_model * (3 * inner + 2 * n_groups * d_state + n_heads)
    return projections + ssd.flops(length, n_heads, head_width, d_state, n_groups)


def saved_elements(
    d_model: int, n_heads: int, head_width: int, d_state: int, n_groups: int, length: int, on_gpu: bool
) -> tuple[float, float]:
    """Elements per token that are saved for the backward pass: (in the model's precision, in float32 always).

    Inputs of the projections and of the convolution, the gate; those of the state space, y, and a few scalars. On a CPU the
    state space is that in C++; where no compiler is, plain torch keeps up to a third less, for heads of 8 channels.
    """
    inner, sizes = n_heads * head_width, (n_heads, head_width, d_state, n_groups)
    of_states = ssd.saved_elements(length, *sizes) if on_gpu else kernel.saved_elements(length, *sizes)
    channels = inner + 2 * n_groups * d_state
    return (
        d_model + short_convolution.saved_elements(channels) + 2 * inner,
        of_states + inner + n_heads + n_groups,
    )
