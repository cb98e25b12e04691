"""Process pools whose workers end with their parent: a number of processes in, a ProcessPoolExecutor out.

A worker of the standard library's pool sleeps for ever if its parent is killed. Every pool of the project is made here.
Called by data/task_runner.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

context = multiprocessing.get_context("spawn")  # a forked process would inherit locks and threads of libraries


@contextmanager
def process_pool(
    n_processes: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `n_processes` new Python processes. `initializer(*initargs)` runs first in each.

    All of them end at once when the parent ends, whatever the signal, and when the block ends by an exception. They ignore
    SIGINT, which a terminal sends to them too: the parent decides.
    """
    # Workers wait for the end of a pipe whose other end only the parent has. This holds on every system. Linux can signal
    # children (PR_SET_PDEATHSIG), but does so when the thread that started them ends, not the process.
    lifeline, held_by_parent = context.Pipe(duplex=False)
    with lifeline, held_by_parent:
        arguments: tuple[Any, ...] = (lifeline, initializer, initargs)
        pool = ProcessPoolExecutor(n_processes, context, _start_worker, arguments)
        resource_tracker.ensure_running()  # it would unblock SIGINT when it is started later
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(n_processes):  # start all processes now, while SIGINT is blocked, which they inherit
                pool.submit(_nothing)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        try:
            yield pool
        except BaseException:
            held_by_parent.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(lifeline: Connection, initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent(lifeline: Connection) -> None:
    lifeline.poll(None)  # returns when the other end is closed
    os._exit(1)


def _nothing() -> None:
    pass
