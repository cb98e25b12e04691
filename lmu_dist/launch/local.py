"""A cluster of several Ray nodes on this machine, behind a token, and an MLflow server beside it. Settings in, processes out.

All of it is in one folder: token, pid files, logs, MLflow's database and artifacts. Other Rays on the machine are not touched.
Called by `lmu-dist cluster up|status|down`, which is what `make cluster-up`, `cluster-status` and `cluster-down` run.
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
from lmu_dist.launch import parts, processes
from lmu_dist.launch.parts import HEAD, MLFLOW, Settings

UP_SECONDS = 180.0  # how long a part may take to answer; on two cores the head takes 10, MLflow 15


@dataclass(frozen=True)
class Part:
    """A process of the cluster, with its children."""

    name: str
    pid: int | None  # None: does not run
    state: str  # dead, silent (does not answer, or not yet) or alive


def up(folder: Path, settings: Settings, progress: Callable[[str], None] = lambda _: None) -> list[Part]:
    """Starts what does not run of the cluster, and waits until it answers. Raises ConfigError, FailedError.

    When something does not come up, all that was started now is ended again.
    """
    folder = folder.resolve()
    environment = parts.mlflow_environment(settings, os.environ, folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(folder):
        _check_same(folder, settings)
        missing = [name for name in settings.parts if processes.pid_of(folder, name) is None]
        if HEAD in missing:  # nodes do not outlive their head for long
            missing = [name for name in settings.parts if name != MLFLOW or name in missing]
        _end(folder, missing)
        parts.check_ports(settings, missing)
        _keep_out_of_packages(folder)
        _make_token(folder / "token")
        storage.write_whole(folder / "settings.json", json.dumps(asdict(settings), indent=1).encode())
        (folder / "basic_auth.ini").write_text(parts.basic_auth(folder))
        try:
            for name in missing:
                progress(f"starting {name}")
                _start(folder, settings, name, environment)
                # One after the other: Ray gives a node 30 seconds, also on a busy machine.
                _wait(folder, [name] if name != MLFLOW else [])
            _wait(folder, settings.parts)
        except BaseException:
            _end(folder, missing)
            raise
    return status(folder)


def status(folder: Path) -> list[Part]:
    """What runs of the cluster, and whether it answers. Raises ConfigError if there never was one."""
    folder = folder.resolve()
    settings = _settings(folder)
    pids = {name: processes.pid_of(folder, name) for name in settings.parts}
    alive = {MLFLOW} if pids[MLFLOW] and _answer(f"{settings.mlflow}/health") is not None else set[str]()
    if pids[HEAD]:
        ips = _living_nodes(settings, folder / "token")
        alive |= {name for name in settings.parts if name != MLFLOW and parts.ip_of(name) in ips}
    states = {name: "dead" if pid is None else "alive" if name in alive else "silent" for name, pid in pids.items()}
    return [Part(name, pids[name], state) for name, state in states.items()]


def down(folder: Path) -> list[str]:
    """Ends the cluster's processes; token, logs, and what MLflow has, stay. Returns the parts that ran. Raises ConfigError."""
    folder = folder.resolve()
    names = _settings(folder).parts
    with _alone(folder):
        ran = [name for name in names if processes.pid_of(folder, name) is not None]
        _end(folder, names)
        _remove_scratch(folder)
    return ran


def exports(folder: Path) -> dict[str, str]:
    """Environment variables by which ray, mlflow and lmu-dist find the cluster. Raises ConfigError if there never was one."""
    settings = _settings(folder.resolve())
    return {
        "RAY_ADDRESS": settings.gcs,
        "RAY_API_SERVER_ADDRESS": settings.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder.resolve() / "token"),
        "MLFLOW_TRACKING_URI": settings.mlflow,
    }


def _settings(folder: Path) -> Settings:
    path = folder / "settings.json"
    try:
        return Settings(**json.loads(path.read_text()))
    except FileNotFoundError as e:
        raise ConfigError(f"there is no cluster in {folder}; start one with lmu-dist cluster up") from e
    except (ValueError, TypeError) as e:  # no JSON, or not these fields
        raise ConfigError(
            f"{path} is cut short or of another version; lmu-dist cluster up, with the options it had, writes it anew"
        ) from e


def _check_same(folder: Path, settings: Settings) -> None:
    """Raises ConfigError if a cluster with other settings runs."""
    try:
        now = _settings(folder)
    except ConfigError:
        return
    if now != settings and any(processes.pid_of(folder, name) for name in now.parts):
        differ = [f"{key} is {value}" for key, value in asdict(now).items() if value != asdict(settings)[key]]
        raise ConfigError(f"the cluster in {folder} runs with other settings ({', '.join(differ)}); end it with cluster down")


def _scratch(folder: Path, new: bool = False) -> Path:
    """Ray's folder, which only this user can enter; the link `ray` leads there, since sockets need a shorter path than that."""
    link = folder / "ray"
    if new:
        _remove_scratch(folder)
        link.symlink_to(tempfile.mkdtemp(prefix="lmu-ray-"))
    return link.readlink()


def _remove_scratch(folder: Path) -> None:
    """Nothing to do where the head was never started."""
    link = folder / "ray"
    if link.is_symlink():
        shutil.rmtree(link.readlink(), ignore_errors=True)
        link.unlink()


def _keep_out_of_packages(folder: Path) -> None:
    """Git and Ray pass over what is here, also where the project does not ask for it: jobs would bring the token."""
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n")


def _make_token(path: Path) -> None:
    """For this user's eyes only; what a token opens today it opens tomorrow."""
    if path.exists() and path.stat().st_size:
        return
    with storage.writing(path) as file:
        os.fchmod(file.fileno(), 0o600)  # before there is anything to read
        file.write(secrets.token_hex(32).encode())


def _start(folder: Path, settings: Settings, name: str, mlflow_environment: Mapping[str, str]) -> None:
    if name == MLFLOW:
        processes.start(folder, name, parts.mlflow_command(settings, folder), mlflow_environment)
        return
    command = parts.ray_command(settings, name, _scratch(folder, new=name == HEAD))
    processes.start(folder, name, command, parts.ray_environment(os.environ, folder / "token", settings.mlflow))


def _wait(folder: Path, names: Sequence[str]) -> None:
    """Until the parts answer. Raises FailedError with the last words of one that does not."""
    deadline = time.monotonic() + UP_SECONDS
    while waiting := [part for part in status(folder) if part.name in names and part.state != "alive"]:
        for part in waiting:
            if part.pid is None or time.monotonic() > deadline:
                how = "ended at once" if part.pid is None else f"did not answer in {UP_SECONDS:.0f} s"
                said = processes.last_words(folder, part.name)[:200]
                raise FailedError(f"{part.name} {how}: {said} (the rest is in {folder / part.name}.log)")
        time.sleep(0.5)


def _living_nodes(settings: Settings, token: Path) -> set[str]:
    """Addresses of the nodes that Ray takes for alive; none if it is not Ray that answers."""
    answer = _answer(f"{settings.dashboard}/api/v0/nodes", {"Authorization": f"Bearer {token.read_text()}"})
    try:
        nodes = json.loads(answer or b"")["data"]["result"]["result"]
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
    except (ValueError, KeyError, TypeError):
        return set()


def _answer(url: str, headers: Mapping[str, str] | None = None) -> bytes | None:
    """The body, or None where nobody answers, or not well."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is for other machines
    try:
        with direct.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=5) as response:
            return response.read()
    except (OSError, HTTPException):
        return None


def _end(folder: Path, names: Sequence[str]) -> None:
    for name in reversed(names):  # nodes sign off from a head that still is there
        processes.stop(folder, name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout as e:
        raise ConfigError(f"another command is at work on the cluster in {folder}; wait for it") from e
