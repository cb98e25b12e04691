"""Starts and stops background processes that outlive their parent, with a pid file and a log for each.

A pid may be reused, and other Ray clusters may run on the machine. So each process has a marker in its environment, which its
children inherit, and only processes with the marker and their descendants are ever signalled. Called by local and tests/netns.
"""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from lmu_dist.config import FailedError

MARKER = "LMU_DIST_PART"  # environment variable: the folder of the pid file and the name of the process
GRACE_SECONDS = 10.0  # timeout after SIGTERM; Ray's processes need two seconds


def start(folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Starts a command with exactly this environment in a new session. Writes NAME.pid and NAME.log to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command,
            env={**environment, MARKER: _marker(folder, name)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / f"{name}.pid").write_text(f"{process.pid}\n")
    # Popen returns a moment before the environment of the new process is visible.
    while process.poll() is None and _marker_of(psutil.Process(process.pid)) is None:
        time.sleep(0.01)


def pid_of(folder: Path, name: str) -> int | None:
    """The pid in the pid file; None if that process has ended or the pid belongs to another process now."""
    try:
        process = psutil.Process(int((folder / f"{name}.pid").read_text()))
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    return process.pid if _marker_of(process) == _marker(folder, name) else None


def stop(folder: Path, name: str, grace_seconds: float = GRACE_SECONDS) -> None:
    """Stops a process and all its descendants, including those it left behind when it died. With no grace time, uses SIGKILL.

    Raises FailedError if a process does not exit.
    """
    if (pid := pid_of(folder, name)) is not None and grace_seconds:
        with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            leader = psutil.Process(pid)
            leader.terminate()  # so that it can stop its children itself
            leader.wait(grace_seconds)
    deadline = time.monotonic() + GRACE_SECONDS
    while alive := _live_processes(folder, name):
        if time.monotonic() > deadline:
            raise FailedError(f"processes of {name} do not exit after SIGKILL: {', '.join(str(p.pid) for p in alive)}")
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=1)
    (folder / f"{name}.pid").unlink(missing_ok=True)


def log_cause(folder: Path, name: str) -> str:
    """The line of a process's log that says why it failed: the last one with a Python error, else the last."""
    lines = [line.strip() for line in (folder / f"{name}.log").read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+Error: ", line)]
    return (errors or lines or ["the log is empty"])[-1]


def _marker(folder: Path, name: str) -> str:
    return f"{folder.resolve()}:{name}"


def _marker_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARKER)
    except (psutil.Error, OSError):
        return None  # the process has ended, is a zombie, or belongs to another user


def _live_processes(folder: Path, name: str) -> set[psutil.Process]:
    """The live processes with the marker, and their descendants: setting its title may overwrite a process's environment."""
    found = set[psutil.Process]()
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _marker_of(process) == _marker(folder, name):
            with suppress(psutil.NoSuchProcess):
                found.update([process, *process.children(recursive=True)])
    return {process for process in found if _is_alive(process)}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
