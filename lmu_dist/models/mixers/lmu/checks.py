"""Checks of what users of the LMU's modules pass: settings, inputs and states. Called by mixer and nn."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor


def check_settings(theta_tokens: float, **counts: int) -> None:
    """Raises ValueError unless the window is a number above 0 and the counts are whole numbers above 0."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
    if not isinstance(theta_tokens, Real) or not 0 < theta_tokens < math.inf:
        raise ValueError(f"theta_tokens must be a number above 0, not {theta_tokens!r}")


def check_input(x: Tensor) -> None:
    """Raises ValueError unless x is a floating-point tensor of (batch, tokens, channels) with at least one token."""
    if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point() or not x.shape[1]:
        raise ValueError(
            f"x must be a floating-point tensor of (batch, tokens, channels) with at least one token, not {_describe(x)}"
        )


def check_state(state: Tensor, shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless the state is float64 and of this shape, (batch, order, channels)."""
    if not isinstance(state, Tensor) or state.shape != shape or state.dtype != torch.float64:
        raise ValueError(
            f"state must be a float64 tensor of (batch, order, channels) = {shape}, as the call before returned it, "
            f"not {_describe(state)}"
        )


def _describe(value: object) -> str:
    return f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
