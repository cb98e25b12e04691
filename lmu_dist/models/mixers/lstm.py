"""The LSTM baseline: (B, T, D) in, (B, T, D) out.

Legend: B batch, T time, D width, H hidden width, L layers. Built by the families.
"""

from torch import Tensor, nn
from torch.func import functional_call

from lmu_dist.array_types import Float
from lmu_dist.models.products import Linear, uses_float32


class LSTM(nn.Module):
    """L layers of torch's LSTM and a projection from H to D. As in cuDNN, each layer has a second, redundant bias vector."""

    def __init__(self, d_model: int, d_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_model, d_hidden, n_layers, batch_first=True)
        self.out = Linear(d_hidden, d_model)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence from a zero state."""
        return self.out(self._recurrence(x, None)[0])

    def advance(
        self, x: Float[Tensor, "B T D"], state: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor]]:
        """Outputs of the next chunk of tokens and the new state, torch's (h, c), each (L, B, H)."""
        y, state = self._recurrence(x, state)
        return self.out(y), state

    def _recurrence(
        self, x: Float[Tensor, "B T D"], state: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B T H"], tuple[Tensor, Tensor]]:
        if not uses_float32(x):
            return self.lstm(x, state)
        weights = {name: weight.float() for name, weight in self.lstm.named_parameters()}
        wide_state = None if state is None else tuple(s.float() for s in state)
        y, (h, c) = functional_call(self.lstm, weights, (x.float(), wide_state))
        return y.to(x.dtype), (h.to(x.dtype), c.to(x.dtype))
