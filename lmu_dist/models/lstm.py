"""The LSTM mixer: (B, T, D) in, (B, T, D) out. Legend: B batch, T time, D width, H hidden width. Built by lm."""

from jaxtyping import Float
from torch import Tensor, nn


class LSTM(nn.Module):
    """One layer of torch's LSTM (one bias vector too many, as in cuDNN) and a projection back to the residual stream."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_model, d_hidden, batch_first=True)
        self.out = nn.Linear(d_hidden, d_model)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """A whole sequence from a zero state."""
        return self.out(self.lstm(x)[0])

    def advance(
        self, x: Float[Tensor, "B T D"], state: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor]]:
        """The next chunk; the state is torch's (h, c), each (1, B, H)."""
        y, state = self.lstm(x, state)
        assert state is not None
        return self.out(y), state
