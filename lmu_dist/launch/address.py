"""The address of a cluster's dashboard, from an option or the environment. It imports nothing slow."""

import os
from urllib.parse import urlsplit

from lmu_dist.config import ConfigError

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # as `ray job` reads them


def dashboard_address(given: str | None) -> str:
    """The URL of the dashboard. Raises ConfigError if there is none, or if it is no URL or holds a password."""
    address = given or next(filter(None, map(os.environ.get, ADDRESSES)), None)
    if address is None or urlsplit(address).scheme not in ("http", "https"):
        instead = f"not {address}" if address else "or set RAY_API_SERVER_ADDRESS"
        raise ConfigError(f"give the address of the cluster's dashboard, --address http://HEAD:8265, {instead}")
    if "@" in urlsplit(address).netloc:
        raise ConfigError("--address holds credentials, which everybody who lists processes could read; remove them from it")
    return address
