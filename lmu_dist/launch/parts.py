"""What a local cluster is made of: settings in, the command and the environment of every part out. Starts nothing. For local.

The Ray nodes have loopback addresses of their own, 127.0.0.2 and on, as if they were machines.
"""

import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmu_dist.config import ConfigError

HEAD, MLFLOW = "head", "mlflow"
STORE_BYTES = 200_000_000  # shared memory of a node: what a run puts there is small, and Ray would take 30 % of the machine
SECRETS = ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")  # what MLflow's own authentication asks for
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")  # with which jobs then come to it
# After half a minute without a network TCP waits as long again before it sends anything; by five checks of ten seconds, which
# is Ray's default, a node may count as lost just then.
PATIENCE = {"RAY_health_check_failure_threshold": "10"}


@dataclass(frozen=True)
class Settings:
    """What the cluster is."""

    nodes: int
    cpus: int  # of each node; the head has none, so that no worker is placed there
    host: str  # IPv4 address on which dashboard and MLflow listen
    port: int  # of Ray's GCS
    dashboard_port: int  # of the Jobs API, too
    mlflow_port: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Names, in the order in which they are started."""
        return (MLFLOW, HEAD, *(f"node-{i + 1}" for i in range(self.nodes)))

    @property
    def gcs(self) -> str:
        """Where nodes and drivers join."""
        return f"{ip_of(HEAD)}:{self.port}"

    @property
    def dashboard(self) -> str:
        """For clients on this machine."""
        return f"http://{self._reached}:{self.dashboard_port}"

    @property
    def mlflow(self) -> str:
        """For clients on this machine."""
        return f"http://{self._reached}:{self.mlflow_port}"

    @property
    def is_open(self) -> bool:
        """Whether others than this machine reach dashboard and MLflow. Raises ConfigError if the host is no address."""
        try:
            return not ipaddress.IPv4Address(self.host).is_loopback
        except ValueError as e:
            raise ConfigError(f"--host {self.host} is no IPv4 address; give one of this machine's, or leave it out") from e

    @property
    def _reached(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def ip_of(part: str) -> str:
    """Of a Ray node. Not 127.0.0.1, which Ray replaces by an address that others reach."""
    return f"127.0.0.{2 if part == HEAD else 2 + int(part.removeprefix('node-'))}"


def ray_start(ip: str, cpus: int, options: Mapping[str, object]) -> list[str]:
    """The command of a Ray node that stays in the foreground."""
    options = {
        "--node-ip-address": ip,
        "--num-cpus": cpus,
        "--object-store-memory": STORE_BYTES,
        # 0: any that is free. Ray's defaults are those of another Ray on this machine, too.
        "--dashboard-agent-listen-port": 0,
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        **options,
    }
    return [str(Path(sys.executable).parent / "ray"), "start", "--block", *(f"{k}={v}" for k, v in options.items())]


def ray_command(settings: Settings, part: str, scratch: Path) -> list[str]:
    """The command of the head or a node; `scratch`: a folder for Ray's, with a short path, since they hold sockets.

    Each has a folder of its own: a node unpacks a job's files anew where it finds them, under the feet of the job.
    """
    folder = {"--temp-dir": scratch / part}
    if part != HEAD:
        return ray_start(ip_of(part), settings.cpus, folder | {"--address": settings.gcs})
    options = folder | {
        "--port": settings.port,
        "--dashboard-host": settings.host,
        "--dashboard-port": settings.dashboard_port,
        "--ray-client-server-port": _listen("127.0.0.1", 0),
    }
    return [*ray_start(ip_of(part), 0, options), "--head"]


def ray_environment(ours: Mapping[str, str], token: Path, mlflow: str, interface: str = "lo") -> dict[str, str]:
    """Of Ray's processes, and so of jobs and workers: ours, without what would lead them to other clusters, and with the
    `interface` by which workers reach each other.
    """
    others = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", *SECRETS)
    return (
        {name: value for name, value in ours.items() if name not in others}
        | {
            # Jobs are started by the name of their command, DeepSpeed builds with ninja: both stand beside this Python.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{ours.get('PATH', '')}",
            # Else gloo takes the address that the host's name has, which need not be one at all.
            "GLOO_SOCKET_IFNAME": interface,
            "LMU_DIST_HOME": ours.get("LMU_DIST_HOME", str(token.parent)),
            "MLFLOW_TRACKING_URI": mlflow,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        | PATIENCE
    )


def mlflow_command(settings: Settings, folder: Path) -> list[str]:
    """The command of the tracking server, with its database and artifacts in the folder."""
    stores = [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"]
    listen = [f"--host={settings.host}", f"--port={settings.mlflow_port}", "--workers=1"]
    app = ["--app-name=basic-auth"] if settings.is_open else []
    return [sys.executable, "-m", "mlflow", "server", *stores, *listen, *app]


def mlflow_environment(settings: Settings, ours: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Of the tracking server. Raises ConfigError if all who reach this machine could use it, or its own jobs could not."""
    environment = {name: value for name, value in ours.items() if not name.startswith("MLFLOW_TRACKING_")}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    if settings.is_open:
        wanted = (*SECRETS, *LOGIN)
        if any(not ours.get(name) for name in wanted) or importlib.util.find_spec("flask_wtf") is None:
            raise ConfigError(
                f"--host {settings.host} opens MLflow to others, so it must ask for a password: set {', '.join(wanted)} "
                "(the last two for jobs), and pip install 'mlflow[auth]'; or leave --host out and come through ssh -L"
            )
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "basic_auth.ini")
    return environment


def basic_auth(folder: Path) -> str:
    """What basic_auth.ini says: MLflow's own, with the accounts in the folder and nothing for whom was given nothing."""
    return (
        f"[mlflow]\ndatabase_uri = sqlite:///{folder}/basic_auth.db\ndefault_permission = NO_PERMISSIONS\n"
        "admin_username = admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )


def check_ports(settings: Settings, missing: Sequence[str]) -> None:
    """Raises ConfigError if somebody listens where the missing parts are to."""
    wanted = [("--mlflow-port", settings.host, settings.mlflow_port)] if MLFLOW in missing else []
    if HEAD in missing:
        # The GCS listens on every address, whatever it is told; it asks for the token.
        wanted += [("--port", "0.0.0.0", settings.port), ("--dashboard-port", settings.host, settings.dashboard_port)]
    for option, host, port in wanted:
        try:
            _listen(host, port)
        except OSError as e:
            raise ConfigError(f"cannot listen on {host}:{port} ({e.strerror}); give another port with {option}") from e


def _listen(host: str, port: int) -> int:
    """The port, which was free a moment ago; any for 0. Raises OSError."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: one that ended a minute ago is not in the way
        s.bind((host, port))
        return s.getsockname()[1]
