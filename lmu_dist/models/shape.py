"""Shape: the widths of one language model. They determine its network, parameters and FLOPs.

models/sizing makes a Shape for a target N, models/lm builds the network and models/accounting counts it. Each family defines
widths of its own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Widths of one language model.

    family          name of the family (models/registry)
    d_model         width of the embedding and of the residual stream
    n_blocks        number of blocks
    sequence_tokens length n of the training sequences
    vocab_tokens    size of the vocabulary
    widths          other widths of the family, by name; also attributes: shape.d_ff, shape.n_heads, shape.order
    base            the model whose learning rates this one takes over (models/width_transfer); None: rates are its own
    """

    family: str
    d_model: int
    n_blocks: int
    sequence_tokens: int
    vocab_tokens: int
    widths: Mapping[str, int] = field(default_factory=dict)
    base: "Shape | None" = None

    def __getattr__(self, name: str) -> int:
        widths: Mapping[str, int] = self.__dict__.get("widths", {})  # missing while an object is unpickled
        if name in widths:
            return widths[name]
        raise AttributeError(f"a shape of family {self.__dict__.get('family')!r} has no width {name!r}")

    def __hash__(self) -> int:
        common = (self.family, self.d_model, self.n_blocks, self.sequence_tokens, self.vocab_tokens)
        return hash((common, tuple(sorted(self.widths.items()))))

    def with_widths(self, **widths: int) -> "Shape":
        """A copy with some of the widths in `widths` changed."""
        return replace(self, widths={**self.widths, **widths})

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types. `from_dict` restores the shape."""
        plain = asdict(replace(self, widths=dict(self.widths), base=None))
        # Left out where there is none: shapes are in the keys of runs, and those of earlier versions have no base.
        return plain | {"base": self.base.to_dict()} if self.base else {k: v for k, v in plain.items() if k != "base"}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Shape":
        """Restores a shape from `to_dict`, of this version or of version 0.1 (which stored all widths at the top level)."""
        common = {f.name for f in fields(cls)}
        flat = {name: value for name, value in stored.items() if name not in common and value}
        known: dict[str, Any] = {name: value for name, value in stored.items() if name in common}
        base = known.pop("base", None)
        return cls(**known | {"widths": flat | stored.get("widths", {})}, base=cls.from_dict(base) if base else None)


def power_of_two(most: float) -> int:
    """The largest power of two that is not above `most`, and at least 1: widths that kernels on a GPU do not have to pad."""
    return 1 << (max(1, int(most)).bit_length() - 1)
