"""The LSTM baseline: (B, T, D) in, (B, T, D) out.

Legend: B batch, T time, D width, H hidden width, L layers. Built by the families.
"""

import torch
from torch import Tensor, nn

from lmu_dist.array_types import Float
from lmu_dist.models.products import Linear, uses_float32

State = tuple[Tensor, Tensor]  # torch's (h, c), each (L, B, H)


class Recurrence(nn.LSTM):
    """L layers of torch's LSTM, in float32 where the processor cannot multiply bfloat16; the results are rounded once.

    The weights are converted here and not in the mixer, because ZeRO 3 has them only while this module's forward pass runs.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "B T D"], state: State | None = None
    ) -> tuple[Float[Tensor, "B T H"], State]:
        """Outputs of the next tokens and the new state; None is a zero state."""
        if not uses_float32(x):
            return super().forward(x, state)
        start = (torch.zeros(self.num_layers, x.shape[0], self.hidden_size, device=x.device),) * 2 if state is None else state
        weights = [weight.float() for weight in self.parameters()]  # in the order of torch's operator
        wide_state = [s.float() for s in start]
        y, h, c = torch.lstm(x.float(), wide_state, weights, True, self.num_layers, 0.0, self.training, False, True)
        return y.to(x.dtype), (h.to(x.dtype), c.to(x.dtype))


class LSTM(nn.Module):
    """L layers of torch's LSTM and a projection from H to D. As in cuDNN, each layer has a second, redundant bias vector."""

    def __init__(self, d_model: int, d_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.lstm = Recurrence(d_model, d_hidden, n_layers, batch_first=True)
        self.out = Linear(d_hidden, d_model)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence from a zero state."""
        return self.out(self.lstm(x)[0])

    def advance(self, x: Float[Tensor, "B T D"], state: State | None) -> tuple[Float[Tensor, "B T D"], State]:
        """Outputs of the next chunk of tokens and the new state."""
        y, new_state = self.lstm(x, state)
        return self.out(y), new_state
