"""Progress of long work: the type of the callback that a caller gives, and calls of it at regular times.

Called by data/prepare and data/task_runner; launch has the type in the signatures of its commands.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lmu_dist import background

PROGRESS_SECONDS = 0.5  # between two calls of a Progress, at most, while work goes on
Progress = Callable[..., None]  # called with: activity, amount done (in data: bytes), total amount, optional text


@contextmanager
def regularly(report: Callable[[], None]) -> Iterator[None]:
    """Calls `report` every PROGRESS_SECONDS from a thread, and once at the end."""
    with background.repeated(report, PROGRESS_SECONDS):
        yield
    report()
