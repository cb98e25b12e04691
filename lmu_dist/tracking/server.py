"""Serves MLflow's web pages for a store that has no server of its own. For `lmu-dist ui`.

The server runs in this process, so that nothing is left when it is stopped, however that happens. Only that command imports it.
"""

import os
import socket
import warnings
from collections.abc import Callable

import uvicorn
from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR

from lmu_dist.config import ConfigError
from lmu_dist.tracking.store import Store

HOST = "127.0.0.1"


def serve(store: Store, port: int, on_ready: Callable[[str], None]) -> None:
    """Serves the pages of a store until Ctrl-C. `port`: 0 takes any free port. Calls `on_ready` with the URL when it answers.

    Only this machine can reach the pages. Raises ConfigError if the port is taken.
    """
    os.environ[BACKEND_STORE_URI_ENV_VAR] = store.uri
    os.environ[ARTIFACT_ROOT_ENV_VAR] = store.artifact_root()
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # it would start processes for jobs that we have none of
    warnings.filterwarnings("ignore", module=r"mlflow\.")  # of what MLflow will have to change
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as e:
        raise ConfigError(f"cannot listen on {HOST}:{port} ({e.strerror}); give another port with --port") from e
    url = f"http://{HOST}:{listener.getsockname()[1]}"
    config = uvicorn.Config("mlflow.server.fastapi_app:app", log_level="warning")
    with listener:
        _Server(config, lambda: on_ready(url)).run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server that says when it answers requests."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn."""
        await super().startup(sockets)
        self._on_ready()
