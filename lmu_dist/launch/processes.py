"""Processes that outlive who started them: commands in, pid files and logs in a folder out; ends them, and nobody else's.

A pid may be another's after a while, and other Rays may run on the machine. So each process carries a mark in its environment,
which its children inherit, and what neither has the mark nor descends from it is never signalled. Called by local, tests/netns.
"""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from lmu_dist.config import FailedError

MARK = "LMU_DIST_PART"  # environment variable: the folder of the pid file, and the name of the part
GRACE_SECONDS = 10.0  # what a process that was asked to end may take; Ray's need two


def start(folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Starts a command with just this environment, in a session of its own; `name`.pid and `name`.log go to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command,
            env={**environment, MARK: _mark(folder, name)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / f"{name}.pid").write_text(f"{process.pid}\n")
    # Popen returns when the command begins to take the place of its child, a moment before the environment is to be seen.
    while process.poll() is None and _mark_of(psutil.Process(process.pid)) is None:
        time.sleep(0.01)


def pid_of(folder: Path, name: str) -> int | None:
    """The pid in the pid file, if that process is still the one that was started; else None."""
    try:
        process = psutil.Process(int((folder / f"{name}.pid").read_text()))
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    return process.pid if _mark_of(process) == _mark(folder, name) else None


def stop(folder: Path, name: str, grace_seconds: float = GRACE_SECONDS) -> None:
    """Ends a part with all that descends from it, also what its death left behind; without grace as a power cut would.

    Raises FailedError if a process does not die.
    """
    if (pid := pid_of(folder, name)) is not None and grace_seconds:
        with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            leader = psutil.Process(pid)
            leader.terminate()  # it sees to its children first
            leader.wait(grace_seconds)
    deadline = time.monotonic() + GRACE_SECONDS
    while family := _family(folder, name):
        if time.monotonic() > deadline:
            raise FailedError(f"processes of {name} do not die: {', '.join(str(p.pid) for p in family)}")
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=1)
    (folder / f"{name}.pid").unlink(missing_ok=True)


def last_words(folder: Path, name: str) -> str:
    """The last line of a part's log."""
    lines = [line.strip() for line in (folder / f"{name}.log").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _mark(folder: Path, name: str) -> str:
    return f"{folder.resolve()}:{name}"


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None  # gone, a zombie, or another user's


def _family(folder: Path, name: str) -> set[psutil.Process]:
    """What lives of a part. Descendants count too: a process that rewrites its title may lose its environment with it."""
    family = set[psutil.Process]()
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _mark_of(process) == _mark(folder, name):
            with suppress(psutil.NoSuchProcess):
                family.update([process, *process.children(recursive=True)])
    return {process for process in family if _lives(process)}


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
