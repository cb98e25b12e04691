"""A store's URI holds no password. Without MLflow, whose import would take as long as the rest of `lmu-dist submit`.

Called by address, and by launch/submission.
"""

from urllib.parse import urlsplit

from lmu_dist.config import ConfigError


def check_no_password(uri: str) -> None:
    """Raises ConfigError if a store's URI holds a password: the URI is printed, logged and saved with every run."""
    try:
        parts = urlsplit(uri)
    except ValueError as e:  # the message leaves the URI out, which may hold a password
        raise ConfigError(f"MLFLOW_TRACKING_URI is no URI ({e}); set it to http://HOST:PORT") from e
    if parts.password or "password=" in parts.query:
        raise ConfigError(
            "MLFLOW_TRACKING_URI holds a password, and everybody who can see a run could read it; remove it and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a database: PGPASSWORD, or a password file)"
        )
