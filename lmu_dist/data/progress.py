"""Progress of long work: the type of the callback that a caller gives, and calls of it at regular times.

Called by data/prepare and data/task_runner; launch has the type in the signatures of its commands.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PROGRESS_SECONDS = 0.5  # between two calls of a Progress, at most, while work goes on
Progress = Callable[..., None]  # called with: activity, amount done (in data: bytes), total amount, optional text


@contextmanager
def regularly(report: Callable[[], None]) -> Iterator[None]:
    """Calls `report` every PROGRESS_SECONDS from a thread, and once at the end."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            report()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    report()
