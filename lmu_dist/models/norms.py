"""The norms of the families: LayerNorm or RMSNorm, their parameters, and what they save for the backward pass.

Built by lm, counted by sizing and accounting. A family chooses with `Family.norm`. Legend: D width.
"""

from typing import Literal

from torch import nn

Norm = Literal["layer", "rms"]
RMS_EPS = 1e-6  # as in Qwen3 (arXiv 2505.09388; rms_norm_eps of its published configurations)


def build(norm: Norm, width: int) -> nn.Module:
    """The norm of vectors of a width: LayerNorm has a gain and a bias, RMSNorm (arXiv 1910.07467) a gain only."""
    return nn.LayerNorm(width) if norm == "layer" else nn.RMSNorm(width, eps=RMS_EPS)


def n_params(norm: Norm, width: int) -> int:
    """Number of trainable parameters."""
    return 2 * width if norm == "layer" else width


def saved_elements(norm: Norm, width: int, on_gpu: bool) -> tuple[int, int]:
    """Elements per vector that autograd saves: (in the model's precision, in float32 always).

    On a CPU torch computes RMSNorm in float32 by single operations, and also saves the normalised vector.
    """
    if norm == "layer":
        return width, 2
    return (width, 1) if on_gpu else (0, 2 * width + 1)
