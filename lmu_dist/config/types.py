"""What the sections of a configuration are made of: its errors and the types of its values."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field


class ConfigError(ValueError):
    """Bad input of the user: the message names the key and the fix. The command line exits with 2."""


class FailedError(RuntimeError):
    """Work that was started and did not end well; the message is one line. The command line exits with 1."""


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
