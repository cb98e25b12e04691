"""Output gate of a recurrent mixer: the mixer's outputs and its input in, (RMSNorm(y) * silu(x W_g)) W_o out, (B, T, D) each.

It follows the recurrence in Gated DeltaNet (arXiv 2412.06464, section 3.4), there with one norm per head. Built by lmu_modern.
"""

from torch import Tensor, nn

from lmu_dist.array_types import Float
from lmu_dist.models.mixers.gated_norm import GatedRMSNorm
from lmu_dist.models.precision import recurrence_dtype
from lmu_dist.models.products import Linear


class OutputGate(nn.Module):
    """Norm, gate and output projection, without biases. Every token is computed by itself: there is no state."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gate = Linear(d_model, d_model, bias=False)
        self.norm = GatedRMSNorm(d_model)
        self.out = Linear(d_model, d_model, bias=False)

    def forward(self, y: Float[Tensor, "B T D"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Gates the outputs y of a mixer by its input x."""
        return self.out(self.norm(y.to(recurrence_dtype(y.dtype)), self.gate(x)))


def n_params(d_model: int) -> int:
    """Number of trainable parameters."""
    return 2 * d_model**2 + d_model


def matmul_flops(d_model: int) -> int:
    """Forward FLOPs per token."""
    return 4 * d_model**2


def saved_elements(d_model: int) -> tuple[int, int]:
    """Elements per token that autograd saves: (x, x W_g, input of W_o) in the model's precision, (y, a scale) in float32."""
    return 3 * d_model, d_model + 1
