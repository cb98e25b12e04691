"""The Legendre memory as a module of its own: signals in, the coefficients of their last theta tokens out. Called by users.

Legend: B batch, T time, D channels, Q order q.
"""

import torch
from torch import Tensor, nn

from lmu_dist.array_types import Float
from lmu_dist.models.mixers.lmu import checks
from lmu_dist.models.mixers.lmu.mixer import advance_memory, memory_dtype
from lmu_dist.models.precision import no_autocast


class LegendreMemory(nn.Module):
    """Legendre coefficients of the last `theta_tokens` tokens of every channel: (B, T, D) to (B, T, D, Q). Nothing is trained.

    With the shifted Legendre polynomials P_i, x(t - r theta) is about sum_i P_i(2r - 1) m_i(t) for 0 <= r <= 1, and exactly so
    for polynomials of a degree below q (Voelker et al. 2019, eq. 3). A token holds from its time to the next one (zero-order
    hold), so the middle of the token d steps ago is at r = (d + 1/2) / theta. Raises ValueError, also when it is called.
    """

    def __init__(self, order: int, theta_tokens: float) -> None:
        super().__init__()
        checks.check_settings(order=order, theta_tokens=theta_tokens)
        self.order, self.theta_tokens = order, theta_tokens

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"order={self.order}, theta_tokens={self.theta_tokens}"

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D Q"]:
        """Coefficients at every token of a whole sequence, from an empty memory."""
        return self.advance(x)[0]

    def advance(
        self, x: Float[Tensor, "B T D"], state: Float[Tensor, "B Q D"] | None = None
    ) -> tuple[Float[Tensor, "B T D Q"], Float[Tensor, "B Q D"]]:
        """Coefficients at every token of the next chunk, and the state for the chunk that follows.

        The state is float64. None is the empty memory, with which a sequence starts.
        """
        checks.check_input(x)
        identity = torch.eye(self.order, dtype=memory_dtype(x.dtype), device=x.device)
        with no_autocast(x.device):
            coefficients, state = advance_memory(x, identity, self.theta_tokens, state)
        return coefficients.transpose(2, 3).to(x.dtype), state
