"""Gated DeltaNet, a mixer with a matrix-valued memory (arXiv 2412.06464, section 3.4): (B, T, D) in, (B, T, D) out.

Legend: B batch, T time, D width, H heads, K and V channels of a key and of a value. Built by families/gated_deltanet.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models.kernels import gated_delta_rule as kernel
from lmu_dist.models.mixers import gated_delta_rule, gpu_kernels, short_convolution
from lmu_dist.models.mixers.decay import draw_rates, draw_step_bias
from lmu_dist.models.mixers.gated_norm import GatedRMSNorm
from lmu_dist.models.mixers.short_convolution import ShortConvolution
from lmu_dist.models.precision import recurrence_dtype
from lmu_dist.models.products import Linear

State = tuple[Tensor, Tensor]  # the last inputs of the convolution, the memory (B, H, K, V)


class GatedDeltaNet(nn.Module):
    """q, k, v = silu(conv(x W)), S_t and o_t of the gated delta rule, out(RMSNorm(o) * silu(x W_gate)).

    Decay and strength of an update are scalars of a head: a_t = exp(-exp(A_log) softplus(x W_a + dt_bias)), beta_t =
    sigmoid(x W_b). Names and initial values are those of the paper's code (fla) and of Qwen3-Next: exp(A_log) is uniform in
    0.01 .. 16, softplus(dt_bias) log-uniform in 0.001 .. 0.1. The recurrence runs in float32 under bf16.
    """

    def __init__(self, d_model: int, n_heads: int, key_width: int, value_width: int) -> None:
        super().__init__()
        self.n_heads, self.key_width, self.value_width = n_heads, key_width, value_width
        channels, values = n_heads * (2 * key_width + value_width), n_heads * value_width
        self.qkv = Linear(d_model, channels, bias=False)
        self.convolution = ShortConvolution(channels)
        self.gate = Linear(d_model, values, bias=False)
        self.decay_and_beta = Linear(d_model, 2 * n_heads, bias=False)
        self.A_log = nn.Parameter(draw_rates(n_heads, 0.01).log())
        self.dt_bias = nn.Parameter(draw_step_bias(n_heads))
        self.norm = GatedRMSNorm(value_width)
        self.out = Linear(values, d_model, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence from an empty memory."""
        inputs = self._inputs(x, self.convolution(self.qkv(x)))
        if gpu_kernels.is_supported("gated_delta_rule", x.dtype, x.device, self.key_width):
            return self._output(x, gpu_kernels.gated_delta_rule(*self._by_head(*inputs), x.dtype))
        return self._output(x, self._rule(*inputs)[0])

    def advance(self, x: Float[Tensor, "B T D"], state: State | None) -> tuple[Float[Tensor, "B T D"], State]:
        """Outputs of the next chunk of tokens, and the state for the chunk that follows."""
        recent, memory = state or (None, None)
        mixed, recent = self.convolution.advance(self.qkv(x), recent)
        inputs = self._inputs(x, mixed)
        if memory is not None and x.shape[1] == 1:
            o, memory = gated_delta_rule.recurrent(*self._by_head(*inputs), memory)
        else:
            o, memory = self._rule(*inputs, memory)
        return self._output(x, o), (recent, memory)

    def _inputs(self, x: Float[Tensor, "B T D"], mixed: Float[Tensor, "B T C"]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads side by side, log decays g and beta of the rule."""
        dtype = recurrence_dtype(x.dtype)
        decay, beta = self.decay_and_beta(x).to(dtype).chunk(2, -1)
        g = -self.A_log.to(dtype).exp() * F.softplus(decay + self.dt_bias.to(dtype))
        return mixed.to(dtype), g, beta.sigmoid()

    def _by_head(self, packed: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        keys, heads = self.n_heads * self.key_width, (self.n_heads, -1)
        q, k, v = (part.unflatten(-1, heads) for part in packed.split([keys, keys, self.n_heads * self.value_width], -1))
        return q, k, v, g, beta

    def _rule(self, packed: Tensor, g: Tensor, beta: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if kernel.is_available(packed.dtype, packed.device):
            return kernel.gated_delta_rule(packed, g, beta, self.key_width, memory)
        return gated_delta_rule.chunked(*self._by_head(packed, g, beta), memory)

    def _output(self, x: Float[Tensor, "B T D"], o: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T D"]:
        gate = self.gate(x).unflatten(-1, (self.n_heads, -1))
        return self.out(self.norm(o, gate).flatten(2))


def n_params(d_model: int, n_heads: int, key_width: int, value_width: int) -> int:
    """Number of trainable parameters."""
    channels, values = n_heads * (2 * key_width + value_width), n_heads * value_width
    of_vectors = short_convolution.n_params(channels) + 2 * n_heads + value_width
    return d_model * (channels + 2 * values + 2 * n_heads) + of_vectors


def matmul_flops(d_model: int, n_heads: int, key_width: int, value_width: int, length: int) -> float:
    """Forward FLOPs per token of the projections and of the chunked rule."""
    channels, values = n_heads * (2 * key_width + value_width), n_heads * value_width
    projections = 2 * d_model * (channels + 2 * values + 2 * n_heads)
    return projections + n_heads * gated_delta_rule.flops(length, key_width, value_width)


def saved_elements(
    d_model: int, n_heads: int, key_width: int, value_width: int, length: int, on_gpu: bool
) -> tuple[float, float]:
    """Elements per token that are saved for the backward pass: (in the model's precision, in float32 always).

    Inputs of the projections and of the convolution, the gate; those of the rule, its outputs, and scalars. On a CPU the rule
    is that in C++; where no compiler is, the chunked rule keeps up to twice as much.
    """
    channels, values = n_heads * (2 * key_width + value_width), n_heads * value_width
    of_rule = kernel.saved_elements(key_width, value_width)
    if on_gpu:
        of_rule = gated_delta_rule.saved_elements(length, key_width, value_width) + 2
    per_head = of_rule + value_width + 2
    return d_model + short_convolution.saved_elements(channels) + 2 * values, n_heads * per_head
