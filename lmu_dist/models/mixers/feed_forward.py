"""Feed-forward sublayer gelu(x W1 + b1) W2 + b2, applied to every token, and its parameters, FLOPs and activations.

Legend: B batch, T time, D width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models.products import Linear


class FeedForward(nn.Module):
    """Feed-forward network of hidden width d_ff (d' in the LMU paper)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = Linear(d_model, d_ff)
        self.out = Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Applies the network to every token."""
        return self.out(F.gelu(self.up(x)))

    def advance(self, x: Float[Tensor, "B T D"], state: None) -> tuple[Float[Tensor, "B T D"], None]:
        """Next chunk of a text. There is no state."""
        return self(x), None


def n_params(d_model: int, d_ff: int) -> int:
    """Number of trainable parameters."""
    return 2 * d_model * d_ff + d_ff + d_model


def matmul_flops(d_model: int, d_ff: int) -> int:
    """Forward FLOPs per token."""
    return 4 * d_model * d_ff


def saved_elements(d_model: int, d_ff: int) -> int:
    """Elements per token that autograd saves for the backward pass."""
    return d_model + 2 * d_ff
