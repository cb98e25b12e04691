"""Family: the base class of every architecture. A family must define `mixer`; everything else has a default.

A family is one file: models/families/NAME.py, a module of an installed package, or a user's file (docs/families.md).
models/registry finds it. Legend: B batch, T time, D width of the residual stream, N non-embedding parameters.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from lmu_dist.config.types import STRICT, ConfigError
from lmu_dist.models import counting
from lmu_dist.models.mixers.feed_forward import FeedForward
from lmu_dist.models.norms import Norm
from lmu_dist.models.recipe import LLAMA, Recipe
from lmu_dist.models.shape import Shape
from lmu_dist.records import Appearance


@dataclass(frozen=True, config=STRICT)
class NoOptions:
    """Options of a family without options."""


class Family(ABC):
    """One architecture. Instances hold no state.

    Subclasses must define `mixer` and may override everything else. tests/models compares overridden counts with the defaults.

    name, version       identify the family in keys of runs, records and reports. Raise `version` with every change that moves
                        losses: runs of different versions are never fitted together. A user's file needs no version, because
                        the digest of the file is its version.
    title, colour, ...  how reports show the family (`Appearance`)
    Options             keys of the family under `model` in a configuration: a frozen pydantic dataclass with defaults
    passive_options     options that change only the speed, not the results. They are not part of a run's key
    sizing_options      options that act only through `widths`. The widths are part of a run's key, so these options are not
    rates_transfer      whether rates hold at every width under `model.base_n_params` (models/width_transfer). Not inherited
    sublayers           the sublayers of all blocks; default: n_blocks times (mixer, feed-forward)
    widths              the family's widths at a given d_model
    n_params, ...       counts of parameters, FLOPs and bytes; default: counted on the meta device (models/counting)
    """

    name: ClassVar[str] = ""  # default: the name of the class in snake case
    version: ClassVar[int | str] = 0
    title: ClassVar[str] = ""  # default: the name
    report_rank: ClassVar[int] = 100  # reports list families in ascending order of it
    colour: ClassVar[str] = ""  # "#rrggbb" on a light page; default: a colour that no other family has
    colour_dark: ClassVar[str] = ""  # on a dark page; default: the same
    marker: ClassVar[str] = ""  # of matplotlib; default: one that no other family has
    line: ClassVar[str] = "-"  # line style of matplotlib
    Options: ClassVar[type] = NoOptions
    passive_options: ClassVar[tuple[str, ...]] = ()
    sizing_options: ClassVar[tuple[str, ...]] = ()
    learned_positions: ClassVar[bool] = False  # whether the model has a learned position embedding
    residual: ClassVar[bool] = True  # True: x <- x + sublayer(norm(x)); False: x <- sublayer(x)
    norm: ClassVar[Norm] = "layer"  # "layer": LayerNorm; "rms": RMSNorm. Also of the norm before the head
    recipe: ClassVar[Recipe] = LLAMA  # optimizer settings for `train.recipe`; default: those that are usual for language models
    rates_transfer: ClassVar[bool] = False
    d_model_multiple: ClassVar[int] = 1  # d_model must be a multiple of it, for example the number of heads

    def __init_subclass__(cls) -> None:
        for own in ("title", "colour", "colour_dark", "marker"):  # a derived family must not look like its base in a report
            if own not in cls.__dict__:
                setattr(cls, own, "")
        if "rates_transfer" not in cls.__dict__:  # its mixer may be another one
            cls.rates_transfer = False
        if not cls.__dict__.get("name"):
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    @abstractmethod
    def mixer(self, shape: Shape, options: Any) -> nn.Module:
        """Builds the token mixer: a causal module from (B, T, D) to (B, T, D).

        If the module has a method `advance(x, state) -> (y, state)` for the next chunk of a text (state None at the start),
        text is generated with it. Otherwise the whole text is computed again for every new token.
        """

    def sublayers(self, shape: Shape, options: Any) -> Iterable[nn.Module]:
        """Builds all sublayers in order. Each is a causal module from (B, T, D) to (B, T, D).

        A generator builds one at a time: each is moved to the device before the next one is built.
        """
        for _ in range(shape.n_blocks):
            yield self.mixer(shape, options)
            yield FeedForward(shape.d_model, shape.d_ff)

    def widths(self, d_model: int, sequence_tokens: int, options: Any) -> dict[str, int] | None:
        """The family's widths at a d_model, before `free_widths` are fitted to N. None if this d_model is not possible."""
        numbers = {
            key: int(value)
            for key, value in asdict(options).items()
            if isinstance(value, int) and key not in (*self.passive_options, *self.sizing_options)
        }
        return None if d_model % self.d_model_multiple else {"d_ff": 4 * d_model, **numbers}

    def free_widths(self, blank: Shape, options: Any, n_params: int) -> Iterator[tuple[str, int, int]]:
        """Yields (name, smallest, largest) of the widths that are fitted to N, finest first. N must grow with each of them."""
        if "d_ff" in blank.widths:
            yield "d_ff", 1, 4 * n_params

    def nominal_d_model(self, n_params: int, n_blocks: int, sequence_tokens: int, options: Any) -> float:
        """The d_model at which the search for N starts. Default: the d_model whose `widths` come nearest to N."""

        def shape_from(least: int, most: int) -> Shape | None:
            """The narrowest possible model with d_model in least .. most, in steps that fit the family."""
            for d_model in range(-(-least // self.d_model_multiple) * self.d_model_multiple, most + 1, self.d_model_multiple):
                if (widths := self.widths(d_model, sequence_tokens, options)) is not None:
                    return Shape(self.name, d_model, n_blocks, sequence_tokens, 1, widths)
            return None

        below = shape = shape_from(1, 4096 * self.d_model_multiple)
        if shape is None:
            raise ValueError(f"family {self.name}: no d_model up to {4096 * self.d_model_multiple} is possible; see `widths`")
        while shape is not None and self.n_params(shape) < n_params:
            below, shape = shape, shape_from(2 * shape.d_model, 4 * shape.d_model)
        if below is None or shape is None:
            return below.d_model if below else 1
        low, high = below.d_model, shape.d_model
        while low < high and (middle := shape_from((low + high) // 2, high - 1)) is not None:
            low, high = (middle.d_model + 1, high) if self.n_params(middle) < n_params else (low, middle.d_model)
        return high

    def n_sublayers(self, shape: Shape) -> int:
        """Number of sublayers. Each has a norm if `residual` is set."""
        return len(self.meta_sublayers(shape))

    def n_params(self, shape: Shape) -> int:
        """Exact number of trainable parameters of all sublayers. models/accounting adds norms, embeddings and the head."""
        return _count_params(self, shape)

    def largest_tensor(self, shape: Shape) -> int:
        """Elements of the largest trainable tensor of all sublayers."""
        return counting.largest_tensor(self.meta_sublayers(shape))

    def matmul_flops(self, shape: Shape) -> float:
        """Forward FLOPs per token in the matrix products of all sublayers, for sequences of shape.sequence_tokens."""
        return _count_flops(self, shape)

    def fft_flops(self, shape: Shape) -> float:
        """Forward FLOPs per token in Fourier transforms. torch's flop counter does not see them."""
        return 0.0

    def executed_flops(self, shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
        """FLOPs per token that all sublayers execute for `n_rows` rows at once: forward, and backward.

        They decide how long a step takes. Default: the counted FLOPs, twice as many backward.
        """
        forward = self.matmul_flops(shape) + self.fft_flops(shape)
        return forward, 2 * forward

    def activation_bytes(self, shape: Shape, n_rows: int, precision: str, on_gpu: bool) -> float:
        """Bytes that all sublayers save for the backward pass of `n_rows` rows. `precision` is fp32 or bf16."""
        return _count_bytes(self, shape, n_rows, precision)

    def operator(self, shape: Shape, options: Any, dtype: torch.dtype, device: torch.device) -> str:
        """Name of the implementation of the mixer that runs on a device, for the record; "" if there is only one."""
        return ""

    def meta_sublayers(self, shape: Shape, options: Any = None) -> list[nn.Module]:
        """The sublayers on the meta device, without memory, for counting. None stands for `options_for_counting`."""
        with torch.device(counting.META):
            return list(self.sublayers(shape, self.options_for_counting(shape) if options is None else options))

    def options_for_counting(self, shape: Shape) -> Any:
        """The options that the default counts build with: those that are widths of the shape, defaults for the others."""
        keys = {f.name for f in fields(self.Options)} & set(shape.widths)
        return self.Options(**{key: type(getattr(self.Options(), key) or 0)(shape.widths[key]) for key in keys})

    def version_with(self, options: Any) -> str:
        """The version of the family under its options, for keys and records. It has the versions of all parts."""
        return str(self.version)

    def appearance(self) -> Appearance:
        """How reports show the family."""
        title = self.title or self.name.replace("_", " ")
        return Appearance(title, self.colour.lower(), (self.colour_dark or self.colour).lower(), self.marker, self.line)


def paper_d_model(n_params: int, n_blocks: int) -> float:
    """d_model = sqrt(N / (12 n_blocks)): the paper's sqrt(N/24) for its two blocks."""
    return (n_params / (12 * n_blocks)) ** 0.5


@contextmanager
def _counting_errors(family: Family, quantity: str, method: str) -> Iterator[None]:
    """Turns an error of a count into a ConfigError that names the method to define."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise ConfigError(
            f"family {family.name}: {quantity} could not be counted on torch's meta device: {reason}; fix the mixer, or define "
            f"{method} in the class (docs/families.md)"
        ) from e


def n_params_with(family: Family, shape: Shape, options: Any) -> int:
    """Number of trainable parameters of all sublayers that a family builds under its options.

    It should be `family.n_params(shape)`. A family that counts by a formula of its own is not built: it gives that number.
    """
    if type(family).n_params is not Family.n_params or options == family.options_for_counting(shape):
        return family.n_params(shape)
    with _counting_errors(family, "its parameters", "n_params()"):
        return counting.n_params(family.meta_sublayers(shape, options))


# The search for widths counts the same shapes many times, and every count builds the sublayers.
@lru_cache(maxsize=4096)
def _count_params(family: Family, shape: Shape) -> int:
    with _counting_errors(family, "its parameters", "n_params()"):
        return counting.n_params(family.meta_sublayers(shape))


@lru_cache(maxsize=4096)
def _count_flops(family: Family, shape: Shape) -> float:
    with _counting_errors(family, "its FLOPs", "matmul_flops()"):
        return counting.matmul_flops(family.meta_sublayers(shape), shape.d_model, shape.sequence_tokens)


@lru_cache(maxsize=4096)
def _count_bytes(family: Family, shape: Shape, n_rows: int, precision: str) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with _counting_errors(family, "the memory of its activations", "activation_bytes()"):
        return counting.saved_bytes(family.meta_sublayers(shape), shape.d_model, shape.sequence_tokens, n_rows, dtype)
