"""Hybrid: the mixer of another modern family, and attention in every k-th block, as in Qwen3-Next and OLMo's hybrid.

Published hybrids have attention in every fourth block (Qwen3-Next, Kimi Linear: arXiv 2510.26692). The default is every second
one, because the default model has two blocks. The parts are families derived from models/modern_family.ModernFamily.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from lmu_dist.config.types import STRICT, ConfigError
from lmu_dist.models.families.gated_deltanet import GatedDeltaNet
from lmu_dist.models.families.llama import Llama
from lmu_dist.models.families.lmu_modern import LMUModern
from lmu_dist.models.families.mamba2 import Mamba2
from lmu_dist.models.family_options import options_of
from lmu_dist.models.modern_family import ModernBlock, ModernFamily
from lmu_dist.models.shape import Shape

ATTENTION = Llama()


@dataclass(frozen=True, config=STRICT)
class HybridOptions:
    """Keys of the hybrid under `model`."""

    mixer: str = "gated_deltanet"  # family whose mixer the other blocks have: gated_deltanet, mamba2 or lmu_modern
    attention_every: Annotated[int, Field(ge=2)] = 2  # block k, 2k, 3k .. has attention; at most n_blocks
    mixer_options: Mapping[str, Any] = field(default_factory=dict)  # keys of the mixer's family, such as {order: 100}


class Hybrid(ModernBlock):
    """Blocks with one of two mixers. The widths of a part have its name in front, as in `llama.n_heads`."""

    name = "hybrid"
    version = 1
    title = "hybrid"
    report_rank = 8
    colour, colour_dark, marker, line = "#3c0f00", "#ff5718", "d", ":"
    Options = HybridOptions
    rates_transfer = True
    sizing_options = ("mixer", "mixer_options")  # options of mixers act through their widths, or change only the speed
    # The families in `model.mixer`. A derived class may add its own: {**Hybrid.mixer_families, "own": Own()}. What an option of
    # it changes must be among its widths, because runs are told apart by these.
    mixer_families: ClassVar[Mapping[str, ModernFamily]] = {f.name: f for f in (GatedDeltaNet(), Mamba2(), LMUModern())}

    def version_with(self, options: HybridOptions) -> str:
        """The versions of the hybrid and of its two parts."""
        parts = (self._mixer_family(options.mixer), ATTENTION)
        return "+".join([str(self.version), *(f"{part.name}:{part.version}" for part in parts)])

    def mixer(self, shape: Shape, options: HybridOptions) -> nn.Module:
        """Builds the mixer of the first block."""
        return next(self.mixers(shape, options))

    def mixers(self, shape: Shape, options: HybridOptions) -> Iterator[nn.Module]:
        """Builds the mixer of every block: attention if its number, counted from 1, is a multiple of attention_every."""
        (other, other_shape, _), (attention, attention_shape, _) = self.parts(shape)
        other_options = _mixer_options(other, options)
        for block in range(1, shape.n_blocks + 1):
            if block % shape.attention_every:
                yield other.mixer(other_shape, other_options)
            else:
                yield attention.mixer(attention_shape, attention.Options())

    def parts(self, shape: Shape) -> Sequence[tuple[ModernFamily, Shape, int]]:
        """The mixer's family, then llama, each with its own widths and its number of blocks."""
        name = next(key.partition(".")[0] for key in shape.widths if "." in key and not key.startswith(f"{ATTENTION.name}."))
        n_attention = shape.n_blocks // shape.attention_every
        return [
            (*_part(shape, self._mixer_family(name)), shape.n_blocks - n_attention),
            (*_part(shape, ATTENTION), n_attention),
        ]

    def widths(self, d_model: int, sequence_tokens: int, options: HybridOptions) -> dict[str, int] | None:
        """Those of both parts, with their names in front, and the common width of SwiGLU."""
        other, attention = self._mixer_family(options.mixer), ATTENTION
        of_other = other.mixer_widths(d_model, sequence_tokens, _mixer_options(other, options))
        of_attention = attention.mixer_widths(d_model, sequence_tokens, attention.Options())
        if of_other is None or of_attention is None:
            return None
        widths = {"d_ff": 1, "attention_every": options.attention_every}
        widths |= {f"{other.name}.{key}": width for key, width in of_other.items()}
        return widths | {f"{attention.name}.{key}": width for key, width in of_attention.items()}

    def nominal_d_model(self, n_params: int, n_blocks: int, sequence_tokens: int, options: HybridOptions) -> float:
        """As in the other modern families. Raises ConfigError if no block would have attention."""
        if options.attention_every > n_blocks:
            raise ConfigError(
                f"model.attention_every={options.attention_every}: no block of model.n_blocks={n_blocks} would have attention; "
                f"lower it, set model.n_blocks to {options.attention_every} or more, or take the family {options.mixer}"
            )
        return super().nominal_d_model(n_params, n_blocks, sequence_tokens, options)

    def operator(self, shape: Shape, options: HybridOptions, dtype: torch.dtype, device: torch.device) -> str:
        """That of the mixer's family."""
        other, part, _ = self.parts(shape)[0]
        return other.operator(part, _mixer_options(other, options), dtype, device)

    def options_for_counting(self, shape: Shape) -> HybridOptions:
        """Those with which the mixer's family is counted."""
        other, part, _ = self.parts(shape)[0]
        return HybridOptions(other.name, shape.attention_every, asdict(other.options_for_counting(part)))

    def _mixer_family(self, name: str) -> ModernFamily:
        """The family in `model.mixer`. Raises ConfigError if there is none."""
        if name not in self.mixer_families:
            raise ConfigError(
                f"model.mixer={name!r}: the blocks without attention cannot have this mixer; take one of "
                f"{', '.join(self.mixer_families)}; for another one derive a class from Hybrid in a file of your own, and "
                "add it to mixer_families (docs/families.md)"
            )
        return self.mixer_families[name]


def _mixer_options(family: ModernFamily, options: HybridOptions) -> Any:
    """The options of the mixer's family. Raises ConfigError for unknown keys and invalid values.

    A model that is built from only its shape has the mixer that the shape names, and default options.
    """
    return options_of(family, options.mixer_options if options.mixer == family.name else {}, "model.mixer_options")


def _part(shape: Shape, family: ModernFamily) -> tuple[ModernFamily, Shape]:
    """A part of a hybrid, and the shape of a model in which all blocks are of this family."""
    prefix = f"{family.name}."
    widths = {key.removeprefix(prefix): width for key, width in shape.widths.items() if key.startswith(prefix)}
    base = _part(shape.base, family)[1] if shape.base else None
    return family, replace(shape, family=family.name, widths={"d_ff": shape.d_ff, **widths}, base=base)
