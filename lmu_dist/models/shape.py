"""Shape: the widths of one language model, whole numbers from which the network and its counts follow.

sizing makes a Shape from a target N, lm builds the network, accounting counts it. What its widths mean is up to the family.
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
    widths          the family's own, by name; read them as attributes: shape.d_ff, shape.n_heads, shape.order
    """

    family: str
    d_model: int
    n_blocks: int
    sequence_tokens: int
    vocab_tokens: int
    widths: Mapping[str, int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> int:
        widths: Mapping[str, int] = self.__dict__.get("widths", {})  # absent while an object is being unpickled
        if name in widths:
            return widths[name]
        raise AttributeError(f"a shape of family {self.__dict__.get('family')!r} has no width {name!r}")

    def __hash__(self) -> int:
        own = (self.family, self.d_model, self.n_blocks, self.sequence_tokens, self.vocab_tokens)
        return hash((own, tuple(sorted(self.widths.items()))))

    def with_widths(self, **widths: int) -> "Shape":
        """The same shape with some of the family's own widths changed."""
        return replace(self, widths={**self.widths, **widths})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the shape back."""
        return asdict(replace(self, widths=dict(self.widths)))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Shape":
        """The shape that `to_dict` wrote, or one of version 0.1, whose families had all their widths in one flat list."""
        own = {f.name for f in fields(cls)}
        flat = {name: value for name, value in stored.items() if name not in own and value}
        return cls(
            **{name: value for name, value in stored.items() if name in own} | {"widths": flat | stored.get("widths", {})}
        )
