"""The console for notes and progress, which is stderr, and JSON on stdout. Used by cli/ and by the other modules here."""

import json
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console

console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_json(facts: Any) -> None:
    """Prints a result as JSON. A number that JSON lacks, such as the loss of a run that diverged, is null."""
    print(json.dumps(_finite(facts), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
