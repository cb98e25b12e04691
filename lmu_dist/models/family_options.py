"""The options of a family: its keys under `model` in, its `Options` out. Called through models/registry, and by hybrids."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lmu_dist.config.explain import explain
from lmu_dist.config.load import COMMON_MODEL_KEYS
from lmu_dist.config.types import ConfigError
from lmu_dist.models.family import Family


def options_of(family: Family, values: Mapping[str, Any], section: str = "model") -> Any:
    """The family's options from its keys under `model`. Raises ConfigError for unknown keys and invalid values.

    `section`: where the configuration has these keys, for the errors.
    """
    known = option_names(family)
    for key in values:
        if key not in known:
            similar = difflib.get_close_matches(key, [*known, *COMMON_MODEL_KEYS], 1)
            keys = f"its own keys are {', '.join(known)}" if known else "it has no keys of its own"
            hint = f"did you mean {section if similar[0] in known else 'model'}.{similar[0]}?" if similar else keys
            raise ConfigError(f"{section}.{key}: unknown key of family {family.name}; {hint}")
    try:
        return TypeAdapter(family.Options).validate_json(json.dumps(dict(values)), strict=True)
    except ValidationError as e:
        raise ConfigError(explain(e, family.Options, section)) from e


def option_names(family: Family) -> tuple[str, ...]:
    """Keys of a family under `model`."""
    return tuple(f.name for f in fields(family.Options))
