"""Runs a function in a background thread while a block of code runs. Called by data and launch."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def running(function: Callable[[], object]) -> Iterator[None]:
    """Runs a function in a thread. When the block has ended, waits until the function returns."""
    thread = threading.Thread(target=function, name=getattr(function, "__qualname__", ""), daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def repeated(function: Callable[[], object], seconds: float) -> Iterator[None]:
    """Calls a function in a thread, each time after `seconds`, until the block ends. An exception ends the calls."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            function()

    with running(repeat):
        try:
            yield
        finally:
            ended.set()
