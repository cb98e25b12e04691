"""The parts of a trained network, so that it can be built without its family: a LanguageModel in; how to build it, out.

What comes out are JSON types (the section `network` of config.json) and the classes of the sublayers. Called by
transformers_folder.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmu_dist.config import ConfigError
from lmu_dist.models import counting
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.registry import family_of

CALL = "_arguments_of_init"  # name of an attribute


@dataclass(frozen=True)
class Parts:
    """`network` is what remote/stored_network builds from; `classes` are the sublayers' classes by their names there."""

    network: dict[str, Any]
    classes: dict[str, type[nn.Module]]


def parts_of(model: LanguageModel, options: Any) -> Parts:
    """The parts of a model with the options of its family. Raises ConfigError if a sublayer's arguments are not JSON types."""
    shape, family = model.shape, family_of(model.shape)
    calls = list(_recorded_calls(family, shape, options, {type(sublayer) for sublayer in model.sublayers}))
    classes = {_class_name(cls): cls for cls, _ in calls}
    network = {
        "positions": shape.sequence_tokens if family.learned_positions else 0,
        "norm": family.norm,
        "residual": model.residual,
        "logit_factor": model.logit_factor,
        "n_blocks": model.n_blocks,
        "sublayers": [[_class_name(cls), arguments] for cls, arguments in calls],
    }
    return Parts(network, classes)


def _class_name(cls: type) -> str:
    """Of two classes with one name, such as torch's LSTM and ours, the module tells which it is."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def _recorded_calls(
    family: Any, shape: Any, options: Any, classes: set[type[nn.Module]]
) -> Iterator[tuple[type[nn.Module], dict[str, Any]]]:
    """(class, arguments by name) of every sublayer that a family builds."""
    with _recorded(classes), torch.device(counting.META):
        sublayers = list(family.sublayers(shape, options))
    for sublayer in sublayers:
        cls, (values, named) = type(sublayer), sublayer.__dict__[CALL]
        yield cls, _by_name(cls, values, named)


def _by_name(cls: type[nn.Module], values: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. Raises ConfigError if they are not JSON types."""
    bound = inspect.signature(cls).bind(*values, **named)
    arguments = dict[str, Any]()
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise ConfigError(_cannot_rebuild(cls, f"{name} cannot be given by its name"))
        arguments |= value if kind == inspect.Parameter.VAR_KEYWORD else {name: value}
    for name, value in arguments.items():
        if not _is_plain(value):
            raise ConfigError(_cannot_rebuild(cls, f"{name} is of type {type(value).__name__}"))
    return arguments


def _cannot_rebuild(cls: type, reason: str) -> str:
    return (
        f"the sublayer {cls.__name__} cannot be built from what a config.json can hold: its argument {reason}; build it in the "
        "family's file from numbers, texts and lists of these, such as MyMixer(shape.d_model), and export again"
    )


def _is_plain(value: Any) -> bool:
    """Whether JSON gives a value back as it is."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


@contextmanager
def _recorded(classes: set[type[nn.Module]]) -> Iterator[None]:
    """Keeps the arguments with which instances of some classes are made in their attribute CALL."""
    before = {cls: cls.__dict__.get("__init__") for cls in classes}

    def recorder(cls: type[nn.Module]) -> Any:
        initialise = cls.__init__

        def init(self: nn.Module, *values: Any, **named: Any) -> None:
            self.__dict__.setdefault(CALL, (values, named))  # a base class, which is called later, must not replace it
            initialise(self, *values, **named)

        return init

    replacements = {cls: recorder(cls) for cls in classes}  # all before one is in place: a class may be the base of another
    try:
        for cls, replacement in replacements.items():
            cls.__init__ = replacement
        yield
    finally:
        for cls, own in before.items():
            if own is None:
                del cls.__init__
            else:
                cls.__init__ = own  # pyright: ignore[reportAttributeAccessIssue]
