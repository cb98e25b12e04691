"""Error classes, value types and path parsing of the configuration."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
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


def whole(value: Any) -> Any:
    """Turns a float with a whole value, such as 2.5e6, into an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(whole), Field(gt=0)]
Natural = Annotated[int, BeforeValidator(whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
# A name that models/registry knows, or path/to/file.py:CLASS: whether there is such a family is checked there.
Family = Annotated[str, Field(pattern=r"^([a-z][a-z0-9_]{0,39}|.+\.py:[A-Za-z_]\w*)$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

STRICT = ConfigDict(extra="forbid", strict=True, validate_default=True)
