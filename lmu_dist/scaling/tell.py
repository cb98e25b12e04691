"""Results as JSON has them: values in, dictionaries of plain numbers, text and null out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lmu_dist.scaling.examine import Examination
from lmu_dist.scaling.laws import parameters


def told(seen: Examination, names: Sequence[str]) -> dict[str, Any]:
    """An examination as JSON has it; `names` say which row is which. Without a certificate no parameter and no interval."""
    held, exact = seen.holdout, seen.certificate
    facts = {
        "law": seen.form.__name__.lower(),
        "n_rows": seen.n_rows,
        "determined": seen.certificate.ok,
        "objective": seen.objective,
        "parameters": parameters(seen.law) if seen.law else {},
        "intervals": {k: list(v) for k, v in seen.intervals.items()} if seen.law else {},
        "profile_intervals": {k: list(v) if v else None for k, v in seen.profiles.items()},
        "n_resamples": seen.n_resamples,
        "certificate": {
            "ok": exact.ok,
            "reasons": list(exact.reasons),
            "n_starts": exact.n_starts,
            "n_agreeing": exact.n_agreeing,
            "gradient": exact.gradient,
            "condition": exact.condition,
        },
        "holdout": None if held is None else asdict(held) | {"reasons": list(held.reasons)},
        "influence": {k: {"row": names[v.row], "without": v.without} for k, v in seen.influence.items()},
    }
    return plain(facts)


def plain(value: Any) -> Any:
    """For JSON: tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return plain(value.item())
    return value
