"""What the sections of a configuration are made of: its errors and the types of its values."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from upath import UPath


class ConfigError(ValueError):
    """Bad input of the user: the message names the key and the fix. The command line exits with 2."""


class FailedError(RuntimeError):
    """Work that was started and did not end well; the message is one line. The command line exits with 1."""


Folder = Path | UPath  # of this machine (or a disk all nodes share), or at a URI; handled alike, see lmu_dist/storage


def open_folder(text: str) -> Folder:
    """The folder, or file, that a path or a URI names. Raises ConfigError for a kind of storage that is not to be had."""
    text = text.removeprefix("file://")
    if "://" not in text:
        # Absolute: the processes of a cluster have working folders of their own.
        return Path(text).expanduser().absolute()
    if "@" in text.split("://")[1].split("/")[0]:
        raise ConfigError(
            f"{text.split('://')[0]}://... holds credentials; give them in the environment (AWS_*), not in the URI"
        )
    try:
        # Other machines change what lies there: a listing is never to be remembered.
        folder = UPath(text, use_listings_cache=False)
        _ = folder.fs  # loads its library, which may not be installed
        return folder
    except (ValueError, ImportError) as e:
        raise ConfigError(f"{text!r} cannot be used: {e}; for s3:// pip install 'lmu-dist[s3]', for gs:// gcsfs") from e


def whole(value: Any) -> Any:
    """Lets 2.5e6 stand for a count."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(whole), Field(gt=0)]
Natural = Annotated[int, BeforeValidator(whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Family = Literal["lmu", "lmu_attention", "transformer", "lstm"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

STRICT = ConfigDict(extra="forbid", strict=True, validate_default=True)
