"""SwiGLU feed-forward sublayer (silu(x W_g) * (x W_u)) W_o without biases, and its parameters, FLOPs and activations.

The formula is that of arXiv 2002.05202, section 2. Built by models/modern_family. Legend: B batch, T time, D width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models.products import Linear


class SwiGLU(nn.Module):
    """Gated feed-forward network of hidden width d_ff. One matrix, `gate_up`, stacks W_g and W_u."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_ff, bias=False)
        self.out = Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Applies the network to every token."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)

    def advance(self, x: Float[Tensor, "B T D"], state: None) -> tuple[Float[Tensor, "B T D"], None]:
        """Next chunk of a text. There is no state."""
        return self(x), None


def n_params(d_model: int, d_ff: int) -> int:
    """Number of trainable parameters."""
    return 3 * d_model * d_ff


def largest_tensor(d_model: int, d_ff: int) -> int:
    """Elements of the largest weight, `gate_up`."""
    return 2 * d_model * d_ff


def matmul_flops(d_model: int, d_ff: int) -> int:
    """Forward FLOPs per token."""
    return 6 * d_model * d_ff


def saved_elements(d_model: int, d_ff: int) -> int:
    """Elements per token that autograd saves for the backward pass: x, gate and up, silu(gate), and their product."""
    return d_model + 4 * d_ff
