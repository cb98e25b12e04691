"""The LSTM baseline: (B, T, D) in, (B, T, D) out.

Legend: B batch, T time, D width, H hidden width, L layers. Built by the families.
"""

from torch import Tensor, nn

from lmu_dist.array_types import Float


class LSTM(nn.Module):
    """L layers of torch's LSTM and a projection from H to D. As in cuDNN, each layer has a second, redundant bias vector."""

    def __init__(self, d_model: int, d_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_model, d_hidden, n_layers, batch_first=True)
        self.out = nn.Linear(d_hidden, d_model)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence from a zero state."""
        return self.out(self.lstm(x)[0])

    def advance(
        self, x: Float[Tensor, "B T D"], state: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor]]:
        """Outputs of the next chunk of tokens and the new state, torch's (h, c), each (L, B, H)."""
        y, state = self.lstm(x, state)
        assert state is not None
        return self.out(y), state
