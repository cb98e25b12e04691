"""Progress of commands that are mostly done at once: nothing is shown in the first seconds. Used by cli/fit."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from lmu_dist import background, show

QUIET_SECONDS = 2.0  # work that ends before shows no progress
TICK_SECONDS = 0.5
LINE_SECONDS = 10.0  # between lines where stderr is no terminal

Progress = Callable[..., None]  # called with: activity, amount done, total amount, optional text


@contextmanager
def slow_progress(activity: str) -> Iterator[Progress]:
    """Shows the progress of a block on stderr once it has run for QUIET_SECONDS, also if the block never reports any.

    Yields the function with which the block reports: what it does, how much is done, the total, and optionally a text.
    """
    begin, reports = time.monotonic(), dict[str, tuple[float, float, str]]()
    with ExitStack() as stack:
        bars = list[show.ProgressBars]()  # made once the block is slow
        next_line = QUIET_SECONDS

        def report(what: str, done: float, total: float, detail: str = "") -> None:
            reports[what] = (done, total, detail)

        def tick() -> None:
            nonlocal next_line
            seconds = time.monotonic() - begin
            if seconds < QUIET_SECONDS:
                return
            if not reports and not show.console.is_terminal:
                if seconds >= next_line:
                    show.console.print(f"{activity}: {seconds:.0f} s so far")
                    next_line = seconds + LINE_SECONDS
                return
            if not bars:
                bars.append(stack.enter_context(show.progress_bars()))
            for what, (done, total, detail) in tuple(reports.items()) or ((activity, (0.0, 1.0, "")),):
                bars[0].update(what, done, total, detail or f"{seconds:.0f} s")

        with background.repeated(tick, TICK_SECONDS):
            yield report
