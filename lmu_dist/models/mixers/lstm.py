"""The LSTM baseline: (B, T, D) in, (B, T, D) out. Legend: B batch, T time, D width, H hidden width, L layers. Built by lm."""

from jaxtyping import Float
from torch import Tensor, nn


class LSTM(nn.Module):
    """torch's stack of L layers (with one bias vector too many each, as in cuDNN) and a projection from H back to D."""

    def __init__(self, d_model: int, d_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_model, d_hidden, n_layers, batch_first=True)
        self.out = nn.Linear(d_hidden, d_model)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """A whole sequence from a zero state."""
        return self.out(self.lstm(x)[0])

    def advance(
        self, x: Float[Tensor, "B T D"], state: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor]]:
        """The next chunk; the state is torch's (h, c), each (L, B, H)."""
        y, state = self.lstm(x, state)
        assert state is not None
        return self.out(y), state
