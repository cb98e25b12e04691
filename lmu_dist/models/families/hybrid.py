"""Hybrid: the mixer of another modern family, and attention in every k-th block, as in Qwen3-Next and OLMo's hybrid.

Published hybrids have attention in every fourth block (Qwen3-Next, Kimi Linear: arXiv 2510.26692). The default is every second
one, because the default model has two blocks. The parts are llama's attention and any other family that is derived from
models/modern_family.ModernFamily.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from lmu_dist.config.types import STRICT, ConfigError
from lmu_dist.models import registry
from lmu_dist.models.modern_family import ModernBlock, ModernFamily
from lmu_dist.models.shape import Shape

ATTENTION = "llama"


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
    sizing_options = ("mixer",)  # names the widths

    def version_with(self, options: HybridOptions) -> str:
        """The versions of the hybrid and of its two parts."""
        parts = (_mixer_family(options.mixer), _attention_family())
        return "+".join([str(self.version), *(f"{part.name}:{part.version}" for part in parts)])

    def mixer(self, shape: Shape, options: HybridOptions) -> nn.Module:
        """Builds the mixer of the first block."""
        return next(self.mixers(shape, options))

    def mixers(self, shape: Shape, options: HybridOptions) -> Iterator[nn.Module]:
        """Builds the mixer of every block: attention if its number, counted from 1, is a multiple of attention_every."""
        (other, other_shape, _), (attention, attention_shape, _) = self.parts(shape)
        # A model that is built from its shape alone, without options, has the mixer that the shape names.
        other_options = _mixer_options(other, options) if options.mixer == other.name else other.Options()
        for block in range(1, shape.n_blocks + 1):
            if block % shape.attention_every:
                yield other.mixer(other_shape, other_options)
            else:
                yield attention.mixer(attention_shape, attention.Options())

    def parts(self, shape: Shape) -> Sequence[tuple[ModernFamily, Shape, int]]:
        """The mixer's family, then llama, each with its own widths and its number of blocks."""
        name = next(key.partition(".")[0] for key in shape.widths if "." in key and not key.startswith(f"{ATTENTION}."))
        n_attention = shape.n_blocks // shape.attention_every
        return [
            (*_part(shape, _mixer_family(name)), shape.n_blocks - n_attention),
            (*_part(shape, _attention_family()), n_attention),
        ]

    def widths(self, d_model: int, sequence_tokens: int, options: HybridOptions) -> dict[str, int] | None:
        """Those of both parts, with their names in front, and the common width of SwiGLU."""
        other, attention = _mixer_family(options.mixer), _attention_family()
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


def _mixer_family(name: str) -> ModernFamily:
    """The family in `model.mixer`. Raises ConfigError if it is not one with the modern block, or is that of attention."""
    family = registry.find(name) if name in registry.names() and name != ATTENTION else None
    if not isinstance(family, ModernFamily):
        known = [name for name, built in registry.built_in().items() if isinstance(built, ModernFamily) and name != ATTENTION]
        raise ConfigError(
            f"model.mixer={name!r}: no other family with the block of {ATTENTION} has this name; take {', '.join(known)} "
            "or one of an installed package (a user's file cannot be part of a hybrid)"
        )
    return family


def _mixer_options(family: ModernFamily, options: HybridOptions) -> Any:
    """The options of the mixer's family. Raises ConfigError for unknown keys and invalid values."""
    try:
        return registry.options_of(family, options.mixer_options)
    except ConfigError as e:
        raise ConfigError(f"model.mixer_options: {e}") from e


def _attention_family() -> ModernFamily:
    family = registry.find(ATTENTION)
    assert isinstance(family, ModernFamily)
    return family


def _part(shape: Shape, family: ModernFamily) -> tuple[ModernFamily, Shape]:
    """A part of a hybrid, and the shape that a model of this family alone would have."""
    prefix = f"{family.name}."
    widths = {key.removeprefix(prefix): width for key, width in shape.widths.items() if key.startswith(prefix)}
    return family, replace(shape, family=family.name, widths={"d_ff": shape.d_ff, **widths})
