"""Short causal convolution of every channel with a kernel of its own: (B, T, D) in, (B, T, D) out.

It comes before the recurrence in Gated DeltaNet (arXiv 2412.06464, section 3.4) and in Mamba-2 (arXiv 2405.21060, section 7).
Built by mixers that let a token see its neighbours. Legend: B batch, T time, D channels, W tokens of the kernel.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

KERNEL_TOKENS = 4  # as in both papers


class ShortConvolution(nn.Module):
    """y_t = sum_j w_j x_(t - W + 1 + j) for every channel, then SiLU if `silu` is set. No bias.

    The weight (D, W) starts uniform within 1/sqrt(W), as torch's convolutions do.
    """

    def __init__(self, channels: int, kernel_tokens: int = KERNEL_TOKENS, silu: bool = True) -> None:
        super().__init__()
        self.silu = silu
        bound = kernel_tokens**-0.5
        self.weight = nn.Parameter(torch.empty(channels, kernel_tokens).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence. The tokens before it are zeros."""
        return self._convolve(F.pad(x, (0, 0, self.weight.shape[1] - 1, 0)), x.shape[1])

    def advance(self, x: Float[Tensor, "B T D"], state: Tensor | None) -> tuple[Float[Tensor, "B T D"], Tensor]:
        """Outputs of the next chunk of tokens, and the state: the last W - 1 inputs (B, W - 1, D)."""
        before = self.weight.shape[1] - 1
        if state is None:
            state = x.new_zeros(x.shape[0], before, x.shape[2])
        inputs = torch.cat([state, x], 1)
        return self._convolve(inputs, x.shape[1]), inputs[:, inputs.shape[1] - before :]

    def _convolve(self, inputs: Float[Tensor, "B L D"], length: int) -> Float[Tensor, "B T D"]:
        """A sum of shifted inputs: on CPUs it takes half the time of torch's convolution with groups (LOG.md)."""
        y = inputs[:, :length] * self.weight[:, 0]
        for j in range(1, self.weight.shape[1]):
            y = torch.addcmul(y, inputs[:, j : j + length], self.weight[:, j])
        return F.silu(y) if self.silu else y
