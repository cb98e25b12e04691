"""The LSTM baseline: a stack of layers without norms or skip connections, as in Kaplan et al. 2020.

Legend: D width, H hidden width, L layers.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lmu_dist.models.counting import bytes_of
from lmu_dist.models.family import Family, paper_d_model
from lmu_dist.models.mixers import lstm as lstm_mixer
from lmu_dist.models.recipe import KAPLAN
from lmu_dist.models.shape import Shape


class LSTM(Family):
    """One sublayer: L = n_blocks LSTM layers and a projection to D. LOG.md has losses with norms and skip connections."""

    name = "lstm"
    version = 1
    title = "LSTM"
    report_rank = 3
    colour, colour_dark, marker, line = "#a8508a", "#e59ac8", "D", ":"
    recipe = KAPLAN
    residual = False

    def mixer(self, shape: Shape, options: Any) -> nn.Module:
        """Builds the stack of LSTM layers."""
        return lstm_mixer.LSTM(shape.d_model, shape.d_hidden, shape.n_blocks)

    def sublayers(self, shape: Shape, options: Any) -> Iterator[nn.Module]:
        """The stack is the only sublayer."""
        yield self.mixer(shape, options)

    def widths(self, d_model: int, sequence_tokens: int, options: Any) -> dict[str, int] | None:
        """The hidden width is a free width."""
        return {"d_hidden": 1}

    def free_widths(self, blank: Shape, options: Any, n_params: int) -> Iterator[tuple[str, int, int]]:
        """The hidden width."""
        yield "d_hidden", 1, 4 * n_params

    def nominal_d_model(self, n_params: int, n_blocks: int, sequence_tokens: int, options: Any) -> float:
        """sqrt(N / (12 n_blocks)), as in the LMU paper."""
        return paper_d_model(n_params, n_blocks)

    def n_sublayers(self, shape: Shape) -> int:
        """One."""
        return 1

    def n_params(self, shape: Shape) -> int:
        """torch's LSTM has two bias vectors per layer."""
        d, h = shape.d_model, shape.d_hidden
        return 4 * h * (d + h + 2 + 2 * (shape.n_blocks - 1) * (h + 1)) + h * d + d

    def largest_tensor(self, shape: Shape) -> int:
        """The weights of the four gates."""
        return 4 * shape.d_hidden * max(shape.d_model, shape.d_hidden)

    def matmul_flops(self, shape: Shape) -> float:
        """The gates of all layers, and the projection."""
        d, h = shape.d_model, shape.d_hidden
        return 8 * h * (d + h + 2 * (shape.n_blocks - 1) * h) + 2 * h * d

    def activation_bytes(self, shape: Shape, n_rows: int, precision: str, on_gpu: bool) -> float:
        """16 of the 17 elements per hidden unit are the workspace of oneDNN."""
        saved = shape.d_model + shape.d_hidden + 17 * shape.d_hidden * shape.n_blocks
        return n_rows * shape.sequence_tokens * saved * bytes_of(precision)
