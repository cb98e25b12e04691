"""Parses the options of `lmu-dist fit` that have a small language of their own: --fix, --tie, --at, --optimum."""

from collections.abc import Sequence

import numpy as np

from lmu_dist.config import ConfigError
from lmu_dist.scaling.constraints import Constraints
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.numbers import parse_cell


def constraints_of(fix: Sequence[str], tie: Sequence[str]) -> Constraints:
    """Returns the constraints of `--fix NAME=VALUE` and `--tie A=B`. Raises ConfigError for anything else."""
    held, ties = dict[str, float](), list[tuple[str, str]]()
    for text in fix:
        name, _, value = (part.strip() for part in text.partition("="))
        try:
            number = float(value)
        except ValueError as e:
            raise ConfigError(f"--fix {text!r} is not NAME=VALUE, such as --fix E=1.69") from e
        if not np.isfinite(number) or (name == "E" and number <= 0):
            raise ConfigError(f"--fix {text!r}: {name} must be {'a positive' if name == 'E' else 'a finite'} number")
        if name in held:
            raise ConfigError(f"--fix {name} is given twice; leave one out")
        held[name] = number
    for text in tie:
        first, _, second = (part.strip() for part in text.partition("="))
        if not first or not second or first == second:
            raise ConfigError(f"--tie {text!r} is not A=B, such as --tie alpha=beta")
        if again := {first, second} & {name for pair in ties for name in pair}:
            raise ConfigError(f"--tie {text!r}: {again.pop()} is tied already; tie every parameter once")
        ties.append((first, second))
    return Constraints(held, tuple(ties))


def points_of(texts: Sequence[str], with_unique: bool) -> tuple[Floats, Floats, Floats | None]:
    """Returns N, D and unique tokens of every `--at N,D` or `--at N,D,U`; numbers may be written as 7B. Raises ConfigError."""
    wanted = 3 if with_unique else 2
    points = list[list[float]]()
    for text in texts:
        values = [number_of(part, "--at") for part in text.split(",")]
        if len(values) != wanted:
            form = "N,D,U with the unique tokens U, such as 7B,140B,100B" if with_unique else "N,D such as 7B,140B"
            raise ConfigError(f"--at {text!r} is not {form}")
        points.append(values)
    columns = np.array(points, np.float64).reshape(len(points), wanted)
    return columns[:, 0], columns[:, 1], columns[:, 2] if with_unique else None


def number_of(text: str, option: str) -> float:
    """Returns a positive number, which may have a suffix as in 7B. Raises ConfigError that names the option."""
    value = parse_cell(text.strip()).by_mark.get(".")
    if value is None or not (0 < value < np.inf):
        raise ConfigError(f"{option} {text!r}: not a positive number such as 1e21 or 7B")
    return value
