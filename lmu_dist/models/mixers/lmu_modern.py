"""The LMU as the mixer of a modern block, with parts that other recurrent mixers have: (B, T, D) in, (B, T, D) out.

Each part is optional: a short convolution before the memory, QK-norm in the implicit attention, and an output gate after it.
Built by families/lmu_modern. Legend: B batch, T time, D width, Q order q, R reduced order q', K = 3R.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.array_types import Float
from lmu_dist.models import norms
from lmu_dist.models.mixers.lmu.mixer import LMU, Form, projected_memory
from lmu_dist.models.mixers.output_gate import OutputGate
from lmu_dist.models.mixers.short_convolution import ShortConvolution
from lmu_dist.models.products import uses_float32


class NormedLMU(LMU):
    """The LMU with QK-norm: p softmax(score_scale Q K^T) V, with RMSNorm over the channels of every row of Q and of K.

    The fused operator has no such norm: whole sequences run in the chunked form, or in `form`, and autograd stores the
    intermediates.
    """

    def __init__(
        self, d_model: int, order: int, reduced_order: int, theta_tokens: float, form: Form | None, score_scale: float
    ) -> None:
        super().__init__(order, reduced_order, theta_tokens, form or "chunked", score_scale)
        self.q_norm, self.k_norm = norms.build("rms", d_model), norms.build("rms", d_model)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence from an empty memory."""
        projected, _ = projected_memory(x, self.projection_matrix, self.theta_tokens, form=self.form or "chunked")
        return self._attend(projected.to(x.dtype))

    def _attend(self, projected: Float[Tensor, "B T K D"]) -> Float[Tensor, "B T D"]:
        q, k, v = F.gelu(projected + self.bias[:, None]).chunk(3, dim=-2)
        q, k, p = self.q_norm(q), self.k_norm(k), self.p[None]
        if uses_float32(q):
            q, k, v, p = q.float(), k.float(), v.float(), p.float()
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.score_scale, dim=-1)
        return (p @ weights @ v).squeeze(-2).to(projected.dtype)


class ModernLMU(nn.Module):
    """convolution (if `short_convolution`) -> LMU -> output gate (if `output_gate`).

    `width_ratio` is d_model of the base / d_model: factor of the scores, and under QK-norm its root (models/width_transfer).
    """

    def __init__(
        self,
        d_model: int,
        order: int,
        reduced_order: int,
        theta_tokens: float,
        form: Form | None = None,
        *,
        short_convolution: bool,
        output_gate: bool,
        qk_norm: bool,
        width_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.convolution = ShortConvolution(d_model) if short_convolution else None
        if qk_norm:
            self.lmu = NormedLMU(d_model, order, reduced_order, theta_tokens, form, d_model**-0.5 * width_ratio**0.5)
        else:
            self.lmu = LMU(order, reduced_order, theta_tokens, form, width_ratio)
        self.output_gate = OutputGate(d_model) if output_gate else None

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Outputs of a whole sequence from an empty memory."""
        y = self.lmu(x if self.convolution is None else self.convolution(x))
        return y if self.output_gate is None else self.output_gate(y, x)

    def advance(self, x: Float[Tensor, "B T D"], state: Any) -> tuple[Float[Tensor, "B T D"], Any]:
        """Outputs of the next chunk of tokens, and the states of the convolution and of the memory after it."""
        last_inputs, memory = state or (None, None)
        y = x
        if self.convolution is not None:
            y, last_inputs = self.convolution.advance(x, last_inputs)
        y, memory = self.lmu.advance(y, memory)
        return (y if self.output_gate is None else self.output_gate(y, x)), (last_inputs, memory)
