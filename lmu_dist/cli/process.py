"""What the command line sets up for its own process: signals, standard output, and which errors are no bugs of this project."""

import errno
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lmu_dist.storage import FULL_BYTES, is_storage_client_error

# Packages whose errors mean that something outside of this project failed, and in what.
OUTSIDE = {"grpc": "Ray", "mlflow": "MLflow", "ray": "Ray", "sqlalchemy": "a database", "sqlite3": "an SQLite database"}


@contextmanager
def signals_like_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM, and SIGHUP of a terminal that is closed, act as Ctrl-C does: they close the runs. nohup still works."""
    handled = list[signal.Signals]()
    if threading.current_thread() is threading.main_thread():
        handled = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in handled:
        # Through the handler of SIGINT, which Ray replaces while workers train.
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a command that a script starts in the background
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


@contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Sends what C++ code and child processes write to file descriptor 1 to stderr. Only Python's sys.stdout is the real one.

    Ray writes log lines there, and a program that reads the JSON of a command must not see them.
    """
    stdout: Any = sys.stdout
    try:
        fd = stdout.fileno()
        results_fd = os.dup(fd) if fd == 1 else None
        if results_fd is not None:
            stdout.flush()
            os.dup2(2, 1)
    except (AttributeError, OSError, ValueError):  # closed, or replaced by something without a file descriptor
        results_fd = None
    if results_fd is None:
        yield
        return
    # A character that the encoding lacks is written as an escape instead of ending the command.
    results = os.fdopen(results_fd, "w", encoding=stdout.encoding, errors="backslashreplace")
    results.reconfigure(line_buffering=stdout.line_buffering)
    sys.stdout = results
    try:
        yield
    finally:
        sys.stdout = stdout
        with suppress(OSError):  # a closed pipe
            results.flush()
        os.dup2(results_fd, 1)
        with suppress(OSError):
            results.close()


def discard_stdout() -> None:
    """Sends what is still to be written to stdout nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def is_reader_gone() -> bool:
    """Whether stdout is a pipe whose reader has ended, as in `lmu-dist status EXPERIMENT | head -1`."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def remote_cause(error: BaseException) -> BaseException:
    """The error that was raised in another process, if Ray delivered it; else the error itself."""
    cause = getattr(error, "cause", None)
    return cause if _package(error) == "ray" and isinstance(cause, BaseException) else error


def outside_failure(error: BaseException) -> str | None:
    """One line about an error of something outside of this project; None for any other error, which is a bug."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"not enough memory ({reason}); use fewer workers (cluster.n_workers) or a smaller cluster.micro_batch_rows"
    if is_storage_client_error(error):
        return f"the storage cannot be reached or refuses access: {reason}"
    if type(error).__name__ == "BrokenProcessPool":
        return f"a process of this command was killed, perhaps because memory ran out: {reason}"
    if (what := OUTSIDE.get(_package(error))) is not None:
        return f"{what} failed: {reason}"
    return None


def system_failure(error: OSError) -> str:
    """What the operating system refused, where, and what to do, as the beginning of a line."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    file = (is_full and error.filename2) or error.filename  # where a file is copied, the second one was to be written
    where = f": {file}" if file else ""
    if is_full:
        folder = next((f for f in (tempfile.gettempdir(), os.getcwd()) if shutil.disk_usage(f).free < FULL_BYTES), "")
        return f"the disk is full{where or (folder and f': {folder}')}; free some space"
    return f"{error.strerror or ' '.join(str(error).split())[:300] or type(error).__name__}{where}; correct this"


def _package(error: BaseException) -> str:
    """The package of the most specific class: Ray derives classes from the errors that it delivers."""
    return type(error).__module__.partition(".")[0]
