"""A local cluster: several Ray nodes on this machine, protected by a token, and an MLflow server.

Its folder holds the token, pid files, logs, and MLflow's database and artifacts. Other Ray clusters on the machine are not
touched. Called by `lmu-dist cluster up|status|down`, which `make cluster-up`, `cluster-status` and `cluster-down` run.
"""

import json
import os
import secrets
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock, Timeout

from lmu_dist import storage
from lmu_dist.config import ConfigError, FailedError
from lmu_dist.launch import local_commands, processes
from lmu_dist.launch.local_commands import HEAD, MLFLOW, LocalClusterSettings
from lmu_dist.records import known_fields

UP_SECONDS = 180.0  # timeout for a process to answer; on two cores the head takes 10 seconds, MLflow 15


@dataclass(frozen=True)
class ClusterProcess:
    """The state of a process of the cluster: MLflow, the Ray head or a Ray node."""

    name: str
    pid: int | None  # None: not running
    state: str  # alive, silent (runs but does not answer, or not yet) or dead


def up(folder: Path, settings: LocalClusterSettings, progress: Callable[[str], None] = lambda _: None) -> list[ClusterProcess]:
    """Starts the processes of the cluster that are not running, and waits until they answer. Raises ConfigError, FailedError.

    If one does not start, all processes that this call has started are stopped.
    """
    folder = folder.resolve()
    environment = local_commands.mlflow_environment(settings, os.environ, folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _exclusive_lock(folder):
        _check_same(folder, settings)
        missing = [name for name in settings.process_names if processes.pid_of(folder, name) is None]
        if HEAD in missing:  # nodes exit soon after their head
            missing = [name for name in settings.process_names if name != MLFLOW or name in missing]
        _stop(folder, missing)
        local_commands.check_ports(settings, missing)
        _write_gitignore(folder)
        _create_token(folder / "token")
        storage.write_atomic(folder / "settings.json", json.dumps(asdict(settings), indent=1).encode())
        (folder / "basic_auth.ini").write_text(local_commands.basic_auth(folder))
        try:
            for name in missing:
                progress(f"starting {name}")
                _start(folder, settings, name, environment)
                if name == MLFLOW:
                    continue  # it starts while Ray does
                # One after the other: Ray gives a node 30 seconds to start. On a busy machine that may be too few, once.
                started = settings.process_names[: 1 + settings.process_names.index(name)]
                try:
                    _wait_until_alive(folder, started, [name])
                except FailedError as e:
                    if processes.pid_of(folder, name) is not None:
                        raise
                    progress(f"starting {name} again: {e}")
                    _stop(folder, [name])
                    _start(folder, settings, name, environment)
                    _wait_until_alive(folder, started, [name])
            _wait_until_alive(folder, settings.process_names, settings.process_names)
        except BaseException:
            _stop(folder, missing)
            raise
    return status(folder)


def status(folder: Path) -> list[ClusterProcess]:
    """The state of each process of the cluster. Raises ConfigError if the folder has no cluster."""
    folder = folder.resolve()
    settings = _settings(folder)
    pids = {name: processes.pid_of(folder, name) for name in settings.process_names}
    alive = {MLFLOW} if pids[MLFLOW] and _get(f"{settings.mlflow}/health") is not None else set[str]()
    if pids[HEAD]:
        ips = _living_nodes(settings, folder / "token")
        alive |= {name for name in settings.process_names if name != MLFLOW and local_commands.ip_of(name) in ips}
    states = {name: "dead" if pid is None else "alive" if name in alive else "silent" for name, pid in pids.items()}
    return [ClusterProcess(name, pids[name], state) for name, state in states.items()]


def down(folder: Path) -> list[str]:
    """Stops the cluster's processes and returns the names of those that ran. Raises ConfigError.

    The token, the logs, and MLflow's database and artifacts are kept.
    """
    folder = folder.resolve()
    names = _settings(folder).process_names
    with _exclusive_lock(folder):
        running = [name for name in names if processes.pid_of(folder, name) is not None]
        _stop(folder, names)
        _remove_scratch(folder)
    return running


def exports(folder: Path) -> dict[str, str]:
    """The environment variables with which ray, mlflow and lmu-dist find the cluster. Raises ConfigError if there is none."""
    settings = _settings(folder.resolve())
    return {
        "RAY_ADDRESS": settings.gcs,
        "RAY_API_SERVER_ADDRESS": settings.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder.resolve() / "token"),
        "MLFLOW_TRACKING_URI": settings.mlflow,
    }


def _settings(folder: Path) -> LocalClusterSettings:
    path = folder / "settings.json"
    try:
        return LocalClusterSettings(**known_fields(LocalClusterSettings, json.loads(path.read_text())))
    except FileNotFoundError as e:
        raise ConfigError(f"there is no cluster in {folder}; start one with lmu-dist cluster up") from e
    except (ValueError, TypeError) as e:  # not JSON, or other fields
        raise ConfigError(
            f"{path} is truncated or from another version; run lmu-dist cluster up with the same options to write it again"
        ) from e


def _check_same(folder: Path, settings: LocalClusterSettings) -> None:
    """Raises ConfigError if the cluster is running with other settings."""
    try:
        now = _settings(folder)
    except ConfigError:
        return
    if now != settings and any(processes.pid_of(folder, name) for name in now.process_names):
        differ = [f"{key} is {value}" for key, value in asdict(now).items() if value != asdict(settings)[key]]
        raise ConfigError(
            f"the cluster in {folder} runs with other settings ({', '.join(differ)}); stop it first with lmu-dist cluster down"
        )


def _scratch(folder: Path, new: bool = False) -> Path:
    """Ray's temporary folder, readable by this user only. The link `ray` points to it: sockets need a short path."""
    link = folder / "ray"
    if new:
        _remove_scratch(folder)
        link.symlink_to(tempfile.mkdtemp(prefix="lmu-ray-"))
    return link.readlink()


def _remove_scratch(folder: Path) -> None:
    """Deletes Ray's temporary folder, if there is one."""
    link = folder / "ray"
    if link.is_symlink():
        shutil.rmtree(link.readlink(), ignore_errors=True)
        link.unlink()


def _write_gitignore(folder: Path) -> None:
    """Makes git and Ray ignore the folder: a submitted job would otherwise contain the token."""
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n")


def _create_token(path: Path) -> None:
    """Creates the token file, readable by this user only, unless there is one."""
    if path.exists() and path.stat().st_size:
        return
    with storage.open_atomic(path) as file:
        os.fchmod(file.fileno(), 0o600)  # before the token is written
        file.write(secrets.token_hex(32).encode())


def _start(folder: Path, settings: LocalClusterSettings, name: str, mlflow_environment: Mapping[str, str]) -> None:
    if name == MLFLOW:
        if (folder / local_commands.MLFLOW_FILE).exists():
            from lmu_dist.tracking.sqlite_file import migrate  # takes seconds, as MLflow does

            migrate(folder / local_commands.MLFLOW_FILE)
        processes.start(folder, name, local_commands.mlflow_command(settings, folder), mlflow_environment)
        return
    command = local_commands.ray_command(settings, name, _scratch(folder, new=name == HEAD))
    processes.start(folder, name, command, local_commands.ray_environment(os.environ, folder / "token", settings.mlflow))


def _wait_until_alive(folder: Path, started: Sequence[str], names: Sequence[str]) -> None:
    """Waits until the processes `names` answer. Raises FailedError with the cause in its log if one does not.

    Also if another of the `started` ones has exited: after the head is gone, no node ever answers.
    """
    deadline = time.monotonic() + UP_SECONDS
    while True:
        states = [process for process in status(folder) if process.name in started]
        failed = [(process.name, "exited") for process in states if process.pid is None]
        waiting = [process.name for process in states if process.name in names and process.state != "alive"]
        if time.monotonic() > deadline:
            failed += [(name, f"did not answer in {UP_SECONDS:.0f} s") for name in waiting]
        for name, failure in failed:
            cause = processes.log_cause(folder, name)[:200]
            raise FailedError(f"{name} {failure}: {cause} (the full log is {folder / name}.log)")
        if not waiting:
            return
        time.sleep(0.5)


def _living_nodes(settings: LocalClusterSettings, token: Path) -> set[str]:
    """The addresses of the nodes that Ray lists as alive; empty if the answer is not from Ray."""
    body = _get(f"{settings.dashboard}/api/v0/nodes", {"Authorization": f"Bearer {token.read_text()}"})
    try:
        nodes = json.loads(body or b"")["data"]["result"]["result"]
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
    except (ValueError, KeyError, TypeError):
        return set()


def _get(url: str, headers: Mapping[str, str] | None = None) -> bytes | None:
    """The body of an HTTP GET; None if the request fails."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without a proxy: the server is on this machine
    try:
        with direct.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=5) as response:
            return response.read()
    except (OSError, HTTPException):
        return None


def _stop(folder: Path, names: Sequence[str]) -> None:
    for name in reversed(names):  # nodes before their head, from which they deregister
        processes.stop(folder, name)


@contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout as e:
        raise ConfigError(f"another command is starting or stopping the cluster in {folder}; wait for it") from e
