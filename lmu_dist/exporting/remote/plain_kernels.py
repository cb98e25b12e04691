"""No kernels: takes the place of kernels and of mixers/gpu_kernels in exported models (REPLACED in transformers_folder).

An exported model runs in plain torch: it compiles nothing and needs no package besides torch and numpy.
"""

from typing import Any

import torch

DTYPES: tuple[torch.dtype, ...] = ()  # none has a kernel
LINE = 16  # channels of a cache line, to which rows of the kernels that are not here are padded


def library() -> None:
    """There is no compiled library."""


def is_available(*_: Any) -> bool:
    """Whether the kernels take tensors of a precision on a device: never."""
    return False


def is_supported(*_: Any) -> bool:
    """Whether a kernel computes an operator: never."""
    return False
