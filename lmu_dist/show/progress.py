"""Progress on stderr: bars on a terminal, lines elsewhere. Used by cli/."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lmu_dist.config import Config
from lmu_dist.show.console import console

FEW = 200  # things, of which each has a line of its own when it is done


class ProgressBars:
    """Shows progress: bars on a terminal; elsewhere a line every ten seconds, or every thirty while nothing changes.

    Elsewhere there is also a line for each of a few things that are done, such as the cells of a ladder.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tasks, self._done = progress, dict[str, TaskID](), dict[str, float]()
        self._last_print_time, self._last_line = 0.0, ""

    def update(self, what: str, done: float, total: float, detail: str = "") -> None:
        """Updates the bar with this label."""
        first = what not in self._tasks
        if first:
            self._tasks[what] = self._progress.add_task(what, total=total, detail=detail)
        self._progress.update(self._tasks[what], completed=done, total=total, detail=detail)
        line, now = f"{what} {done / (total or 1):.0%} {detail}", time.monotonic()
        counted = 1 < total <= FEW and done != self._done.get(what)
        self._done[what] = done
        if console.is_terminal:
            return
        if first or counted or now - self._last_print_time > (30 if line == self._last_line else 10):
            self._last_print_time, self._last_line = now, line
            console.print(line)

    def update_training(self, config: Config, latest: dict[str, float]) -> None:
        """Shows the latest step of a run, or, before the first step, that its workers are starting."""
        if "train/loss_nats" not in latest:
            self.update("starting the workers", 0, 1)
            return
        speed = latest.get("speed/tokens_per_second", 0.0)
        validation = f", validation {latest['val/loss_nats']:.3f}" if "val/loss_nats" in latest else ""
        detail = f"loss {latest['train/loss_nats']:.3f}{validation} nats, {speed:,.0f} tokens/s"
        self.update("training", latest["train/tokens"], config.train.n_steps * config.train.batch_tokens, detail)


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    """Shows progress on stderr while the context is open; the bars are removed at its end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield ProgressBars(progress)
