"""The results of models/accounting that a run records: numbers of parameters and FLOPs. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Parameters:
    """Trainable parameters.

    `non_embedding` is N as in Kaplan et al. 2020. `with_head` adds the tied V x D matrix of the head, as in Porian et al. 2024.
    `total` also adds learned positions and equals numel().
    """

    non_embedding: int
    head: int
    position: int

    @property
    def with_head(self) -> int:
        """N plus the parameters of the tied head."""
        return self.non_embedding + self.head

    @property
    def total(self) -> int:
        """All trainable parameters."""
        return self.with_head + self.position


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token of a forward pass. A multiply-add counts 2; elementwise operations are not counted.

    matmul  matrix products of the blocks; causal attention is counted at its full length n, as torch's flop counter does
    fft     the LMU's Fourier transforms: 5/2 m log2 m per real transform of m = 2n points, 6 per complex product. Convolutions
            are counted as FFTs even if another algorithm runs, so that the compute of a study does not depend on its hardware
    head    the product with the V x D matrix of the head
    kaplan  2N: the convention behind C = 6ND
    """

    matmul: float
    fft: float
    head: float
    kaplan: float

    @property
    def forward(self) -> float:
        """FLOPs per token of a forward pass."""
        return self.matmul + self.fft + self.head

    @property
    def training(self) -> float:
        """FLOPs per token of forward and backward pass. The backward pass counts twice the forward pass."""
        return 3 * self.forward

    @property
    def training_kaplan(self) -> float:
        """FLOPs per token by the convention 6N."""
        return 3 * self.kaplan
