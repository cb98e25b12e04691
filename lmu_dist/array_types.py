"""Annotations of arrays and tensors with their shapes: jaxtyping's types, or what is left of them where nobody checks shapes.

`Float[Tensor, "B T D"]` documents a shape to readers and type checkers. Tests import jaxtyping before this package, and it then
checks every call (tests/typecheck.py). Otherwise the annotation is plain `Tensor`, so that the package needs no jaxtyping.
Imported by all modules that annotate shapes.
"""

import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Complex64", "Float", "Int", "Integer"]


class _Unchecked:
    """Takes the place of a type of jaxtyping: `[Tensor, "B T D"]` is Tensor."""

    def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
        return array_and_shape[0]


if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Complex64, Float, Int, Integer
else:
    Complex64 = Float = Int = Integer = _Unchecked
