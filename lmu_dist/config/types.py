"""Error classes, value types and path parsing of the configuration."""

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from upath import UPath


class ConfigError(ValueError):
    """Invalid user input. The message names the key and the fix; the command exits with code 2."""


class FailedError(RuntimeError):
    """Work that was started and failed. The message is one line; the command exits with code 1."""


Folder = Path | UPath  # a local (or shared) path, or a URI; both are handled alike, see lmu_dist/storage


def open_folder(text: str) -> Folder:
    """Parses a path or a URI. Raises ConfigError if the URI holds credentials or its storage library is missing."""
    text = text.removeprefix("file://")
    if "://" not in text:
        # Absolute, because the processes of a cluster have other working folders.
        return Path(text).expanduser().absolute()
    if "@" in text.split("://")[1].split("/")[0]:
        raise ConfigError(
            f"{text.split('://')[0]}://... holds credentials; give them in the environment (AWS_*), not in the URI"
        )
    try:
        # Other machines write to the same storage, so a folder listing must not be cached.
        folder = UPath(text, use_listings_cache=False)
        _ = folder.fs  # loads its library, which may not be installed
        return folder
    except (ValueError, ImportError) as e:
        libraries = "for s3://, .venv/bin/pip install -c requirements.lock -e '.[s3]' in the checkout; for gs://, gcsfs"
        raise ConfigError(f"{text!r} cannot be used: {e}; install its library: {libraries}") from e


WRITTEN_NUMBER = re.compile(r"([+-]?[0-9][0-9_]{0,40}(?:\.[0-9]{0,40})?(?:[eE][+-]?[0-9]{1,3})?) ?([kKMGBT]?)")
FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def number(value: Any) -> Any:
    """Turns a number as people write it, such as 2.5M, 8k, 1B or 1_000_000, into a number. Returns other values unchanged."""
    match = WRITTEN_NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    exact = Decimal(match[1]) * FACTORS[match[2].lower()]
    return int(exact) if exact == exact.to_integral_value() else float(exact)


def whole(value: Any) -> Any:
    """Turns a float with a whole value, such as 2.5e6, or a number as people write it, into an int."""
    # A count has no thousandths, so that 10m can only be ten million. Of a learning rate it might be a thousandth.
    value = number(value.removesuffix("m") + "M" if isinstance(value, str) and value.endswith("m") else value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def numbers_in(values: Any) -> Any:
    """Applies `number` to the values of a mapping or a tuple whose values may be anything."""
    if isinstance(values, dict):
        return {key: number(value) for key, value in values.items()}
    return tuple(number(value) for value in values) if isinstance(values, tuple) else values


def listed(value: Any) -> Any:
    """Turns a list, or a single value for a list of one, into a tuple. `null` is no value."""
    return value if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def section(value: Any) -> Any:
    """Turns a section without keys, as in a YAML file whose lines below it are comments, into one that sets nothing."""
    return {} if value is None else value


def _check(pattern: str, description: str) -> Callable[[str], str]:
    """A validator of text that says in words what is allowed."""

    def check(value: str) -> str:
        if re.fullmatch(pattern, value) is None:
            shown = repr(value if len(value) <= 60 else f"{value[:60]}...")
            hint = f"; several are a list: [{', '.join(value.split(','))}]" if re.fullmatch(r"\w+(, ?\w+)+", value) else ""
            raise ValueError(f"must be {description}, not {shown}{hint}")
        return value

    return check


Count = Annotated[int, BeforeValidator(whole), Field(gt=0, lt=2**63)]
Natural = Annotated[int, BeforeValidator(whole), Field(ge=0, lt=2**63)]
Positive = Annotated[float, BeforeValidator(number), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Exponent = Annotated[float, Field(ge=-3, le=3)]
# A name that models/registry knows, or path/to/file.py:CLASS: whether there is such a family is checked there.
Family = Annotated[
    str,
    AfterValidator(
        _check(
            r"[a-z][a-z0-9_]{0,39}|.+\.py:[A-Za-z_]\w*",
            "the name of a family (lower-case letters, digits and _) or path/to/file.py:CLASS",
        )
    ),
]
Name = Annotated[
    str,
    AfterValidator(
        _check(
            r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
            "1 to 100 letters, digits, dots, dashes and underscores, the first of them a letter or a digit",
        )
    ),
]
Listed = BeforeValidator(listed)  # for a list: a single value is a list of one
Texts = Annotated[tuple[str, ...], Listed]
Section = BeforeValidator(section)  # for a section with defaults: one without keys is the defaults

STRICT = ConfigDict(extra="forbid", strict=True, validate_default=True)
