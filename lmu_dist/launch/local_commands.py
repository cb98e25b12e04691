"""The command and the environment of every process of a local cluster, made from its settings. Starts nothing. For local.

Each Ray node has its own loopback address, from 127.0.0.2 on, as if it were a machine.
"""

import importlib.util
import ipaddress
import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lmu_dist.config import ConfigError, FailedError

HEAD, MLFLOW = "head", "mlflow"
MLFLOW_FILE = "mlflow.db"  # the database of the MLflow server, in the folder of the cluster
STORE_BYTES = 200_000_000  # shared memory of a node: runs need little, and Ray's default is 30 % of the machine's memory
SECRETS = ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")  # settings of MLflow's authentication
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")  # with which jobs log in to it
# After half a minute without a network, TCP waits as long again before it retransmits. With Ray's default of five checks, ten
# seconds apart, a node may be declared dead in that time.
HEALTH_CHECK_SETTINGS = {"RAY_health_check_failure_threshold": "10"}
# Ports that are probably still free half a minute later, when a slow process binds one. Ray's workers use 10002 to 19999, and
# Linux gives 32768 to 60999 to connections.
FREE_PORTS = range(20_000, 30_000)


@dataclass(frozen=True)
class LocalClusterSettings:
    """The settings of a local cluster, saved as settings.json in its folder."""

    nodes: int
    cpus: int  # of each node; the head has none, so that Ray places no worker on it
    host: str  # IPv4 address on which dashboard and MLflow listen
    port: int  # of Ray's GCS
    dashboard_port: int  # also of the Jobs API
    mlflow_port: int

    @property
    def process_names(self) -> tuple[str, ...]:
        """The names of the processes, in the order in which they are started."""
        return (MLFLOW, HEAD, *(f"node-{i + 1}" for i in range(self.nodes)))

    @property
    def gcs(self) -> str:
        """The address that nodes and drivers connect to."""
        return f"{ip_of(HEAD)}:{self.port}"

    @property
    def dashboard(self) -> str:
        """The URL of the dashboard, for clients on this machine."""
        return f"http://{self._client_host}:{self.dashboard_port}"

    @property
    def mlflow(self) -> str:
        """The URL of MLflow, for clients on this machine."""
        return f"http://{self._client_host}:{self.mlflow_port}"

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach the dashboard and MLflow. Raises ConfigError if the host is not an IPv4 address."""
        try:
            return not ipaddress.IPv4Address(self.host).is_loopback
        except ValueError as e:
            raise ConfigError(
                f"--host {self.host} is not an IPv4 address; give an address of this machine, or leave --host out"
            ) from e

    @property
    def _client_host(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def ip_of(name: str) -> str:
    """The address of the head or a node. Not 127.0.0.1, because Ray replaces that by an address of the network."""
    return f"127.0.0.{2 if name == HEAD else 2 + int(name.removeprefix('node-'))}"


def ray_start(ip: str, cpus: int, options: Mapping[str, object]) -> list[str]:
    """The command that runs a Ray node in the foreground."""
    options = {
        "--node-ip-address": ip,
        "--num-cpus": cpus,
        "--object-store-memory": STORE_BYTES,
        # 0: any free port. With Ray's default ports two clusters on one machine collide.
        "--dashboard-agent-listen-port": 0,
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        **options,
    }
    return [str(Path(sys.executable).parent / "ray"), "start", "--block", *(f"{k}={v}" for k, v in options.items())]


def ray_command(settings: LocalClusterSettings, name: str, scratch: Path) -> list[str]:
    """The command of the head or a node. `scratch`: a folder with a short path, since Ray keeps sockets in it.

    Each node has its own temporary folder. In a shared one, a node would unpack a job's files over those the job is using.
    """
    folder = {"--temp-dir": scratch / name}
    if name != HEAD:
        return ray_start(ip_of(name), settings.cpus, folder | {"--address": settings.gcs})
    options = folder | {
        "--port": settings.port,
        "--dashboard-host": settings.host,
        "--dashboard-port": settings.dashboard_port,
        "--ray-client-server-port": free_port(),  # cannot be left out; where its port is taken, Ray ends the whole node
    }
    return [*ray_start(ip_of(name), 0, options), "--head"]


def ray_environment(inherited: Mapping[str, str], token: Path, mlflow: str, interface: str = "lo") -> dict[str, str]:
    """The environment of Ray's processes, and so of jobs and workers.

    It is `inherited` without the variables of other clusters, and with the network `interface` that connects the workers.
    """
    others = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", *SECRETS)
    return (
        {name: value for name, value in inherited.items() if name not in others}
        | {
            # Jobs start their command by name, which is in the folder of this Python.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', '')}",
            # By default gloo takes the address of the host's name, which may not exist.
            "GLOO_SOCKET_IFNAME": interface,
            "LMU_DIST_HOME": inherited.get("LMU_DIST_HOME", str(token.parent)),
            "MLFLOW_TRACKING_URI": mlflow,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        | HEALTH_CHECK_SETTINGS
    )


def mlflow_command(settings: LocalClusterSettings, folder: Path) -> list[str]:
    """The command of the MLflow server. Its database and artifacts are in the folder."""
    stores = [f"--backend-store-uri=sqlite:///{folder}/{MLFLOW_FILE}", f"--artifacts-destination={folder}/artifacts"]
    listen = [f"--host={settings.host}", f"--port={settings.mlflow_port}", "--workers=1"]
    app = ["--app-name=basic-auth"] if settings.is_open else []
    return [sys.executable, "-m", "mlflow", "server", *stores, *listen, *app]


def mlflow_environment(settings: LocalClusterSettings, inherited: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment of the MLflow server.

    Raises ConfigError if other machines could use it without a password, or if jobs would have none.
    """
    environment = {name: value for name, value in inherited.items() if not name.startswith("MLFLOW_TRACKING_")}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    if settings.is_open:
        wanted = (*SECRETS, *LOGIN)
        if any(not inherited.get(name) for name in wanted) or importlib.util.find_spec("flask_wtf") is None:
            raise ConfigError(
                f"--host {settings.host} makes MLflow reachable from other machines, so it needs a password: set "
                f"{', '.join(wanted)} (the last two for jobs), and pip install 'mlflow[auth]'; or leave --host out and "
                "connect through ssh -L"
            )
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "basic_auth.ini")
    return environment


def basic_auth(folder: Path) -> str:
    """The content of basic_auth.ini: MLflow's default, with the accounts in the folder and no permissions by default."""
    return (
        f"[mlflow]\ndatabase_uri = sqlite:///{folder}/basic_auth.db\ndefault_permission = NO_PERMISSIONS\n"
        "admin_username = admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )


def check_ports(settings: LocalClusterSettings, missing: Sequence[str]) -> None:
    """Raises ConfigError if a port of the processes to start is in use."""
    wanted = [("--mlflow-port", settings.host, settings.mlflow_port)] if MLFLOW in missing else []
    if HEAD in missing:
        # The GCS always listens on every address; it requires the token.
        wanted += [("--port", "0.0.0.0", settings.port), ("--dashboard-port", settings.host, settings.dashboard_port)]
    for option, host, port in wanted:
        try:
            _listen(host, port)
        except OSError as e:
            raise ConfigError(f"cannot listen on {host}:{port} ({e.strerror}); give another port with {option}") from e


def free_port() -> int:
    """A port that is free on all addresses of this machine, for a server that binds it later. Raises FailedError."""
    for port in random.SystemRandom().sample(FREE_PORTS, len(FREE_PORTS)):
        with suppress(OSError):
            _listen("0.0.0.0", port)
            return port
    raise FailedError(f"the ports from {FREE_PORTS.start} to {FREE_PORTS.stop - 1} are in use; stop what listens on them")


def _listen(host: str, port: int) -> None:
    """Binds a port and releases it again. Raises OSError if it is in use."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like servers do, so that a port in TIME_WAIT counts as free
        s.bind((host, port))
