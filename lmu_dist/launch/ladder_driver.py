"""The driver of a ladder that has cells to train: Ray Tune trials, which take trunks from a queue, wave after wave.

Ray Tune takes more than a second to import, so this module is imported only if cells must be trained. Called by ladder.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from filelock import Timeout
from ray import tune
from ray.exceptions import RayError

from lmu_dist import records, storage
from lmu_dist.config import ConfigError, FailedError
from lmu_dist.data.progress import Progress
from lmu_dist.launch import claim
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.cluster import capacity
from lmu_dist.launch.ladder_state import LadderState
from lmu_dist.launch.ladder_trial import train_work_items
from lmu_dist.launch.metrics_logger import release_log, start_metrics_logger
from lmu_dist.launch.new_cell import at_half_rate
from lmu_dist.launch.record import record_path
from lmu_dist.launch.trials import Slots, TrialCallback, driver_environment, error_message, head_node_id, run_trials
from lmu_dist.launch.work_queue import WorkItem, WorkState, start_work_queue
from lmu_dist.tracking.tags import LADDER_STUDY

CLOSING_SECONDS = 30.0  # timeout of an interrupted ladder for closing its MLflow runs
POLL_SECONDS = 5.0  # between two checks whether another driver has finished
STATE_SECONDS = 10.0  # how long the queue may take to say what is running
NO_RECORD = "its trial ended without a record"


class LadderDriver:
    """Trains what a state says is missing. `progress` shows how many cells have ended."""

    def __init__(self, state: LadderState, progress: Progress = lambda *_: None) -> None:
        self.state, self.progress = state, progress
        self.work_items: Sequence[WorkItem] = ()
        self.work = WorkState()  # of these items
        self.queue: Any = None  # the WorkQueue that hands them out
        self.metrics_logger: Any = None  # of all runs
        self._ended: set[str] = set()  # keys of cells that have ended since the last refresh
        self._asked: tuple[Sequence[WorkItem], Any] | None = None  # work items, and the answer to come of their queue

    def run(self, scratch: Path) -> None:
        """Trains trunks until each cell has ended or failed. Waits for trunks that another driver is training."""
        n_slots = capacity(self.state.cells[0].config)
        head = head_node_id()
        self.metrics_logger = start_metrics_logger(self.state.store.uri, head)
        while trunks := self.state.next_trunks(n_slots):
            items = [WorkItem(tuple(trunk), trunk[0].config.cluster.n_workers) for trunk in trunks]
            self.work_items, self.queue, self.work = items, start_work_queue(items, n_slots, head), WorkState()
            try:
                results = self._run_trials(scratch, n_slots)
            finally:
                self._update_work()  # also for `close`, if the ladder is interrupted
            self.close(records.FAILED, CLOSING_SECONDS)
            self._refresh()
            self._note_failures(results)
            if self.work.busy:
                self.report_progress("waiting for another driver, or for MLflow")
                time.sleep(POLL_SECONDS)
                self._refresh()

    def _run_trials(self, scratch: Path, n_slots: int) -> list[Any]:
        return run_trials(
            train_work_items,
            {
                "config": self.state.cells[0].config,
                "tracking_uri": self.state.store.uri,
                "environment": driver_environment(),
                "metrics_logger": self.metrics_logger,
                "queue": self.queue,
            },
            scratch,
            tune.TuneConfig(search_alg=Slots(self._reserve, n_slots), num_samples=len(self.work_items), reuse_actors=True),
            callbacks=[TrialCallback(on_tick=self.report_progress)],
        )

    def _reserve(self, group: str, n_free: int) -> int | None:
        return ray.get(self.queue.reserve.remote(group, n_free))

    def _update_work(self) -> None:
        """Asks the queue which work items are running and which have ended."""
        with suppress(RayError):  # the cluster was lost: the last answer holds
            answer: ray.ObjectRef[WorkState] = self.queue.state.remote()
            self.work = ray.get(answer, timeout=STATE_SECONDS)

    def _note_failures(self, results: Sequence[Any]) -> None:
        """Notes why cells that were tried have no record: what their trials say, or why these died."""
        of_trials = {result.config["group"]: error_message(result) for result in results if result.config}
        for index in {*self.work.ended, *self.work.running} - self.work.busy:
            message = self.work.ended.get(index) or of_trials.get(self.work.running.get(index, "")) or NO_RECORD
            cells = self.work_items[index].cells
            self.state.failures |= {cell.name: message for cell in cells if cell.key not in self.state.finished}

    def note_ended(self, cells: Iterable[Cell]) -> None:
        """Notes for the progress that cells of this ladder have ended, with whatever status."""
        self._ended.update(cell.key for cell in cells if cell.key not in self.state.finished)

    def report_progress(self, remark: str = "") -> None:
        """Updates the progress bar by what is known of the cells, which costs no file of those that have ended."""
        self._ask_queue()
        ended, n_cells = len(self.state.finished) + len(self._ended), len(self.state.cells)
        self.progress("ladder", ended, n_cells, f"{ended} of {n_cells} cells ended {remark}".strip())

    def _ask_queue(self) -> None:
        """Notes the cells that have ended since the queue was asked last, and asks it again. Waits for no answer."""
        if self.queue is None:
            return
        if self._asked is not None and ray.wait([self._asked[1]], timeout=0)[0]:
            items, answer = self._asked
            with suppress(RayError):  # the cluster was lost: the last answer holds
                state: WorkState = ray.get(answer)
                for index, error in state.ended.items():
                    self.note_ended(() if error or index in state.busy else items[index].cells)
                for index in state.running:
                    self._note_records(items[index].cells)
            self._asked = None
        if self._asked is None:
            self._asked = self.work_items, self.queue.state.remote()

    def _note_records(self, cells: Sequence[Cell]) -> None:
        """Notes which cells of a trunk that is running have ended, the shortest first. At a URI each would be a request."""
        if storage.is_remote(cells[0].config.storage_folder):
            return
        for cell in cells:
            if cell.key not in self._ended:
                if not record_path(cell).exists():
                    return
                self.note_ended([cell])

    def close(self, status: str, timeout_seconds: float) -> None:
        """Closes the MLflow runs of trials that died or were interrupted, because their workers cannot."""
        deadline, release = time.monotonic() + timeout_seconds, partial(release_log, self.metrics_logger)
        for cell in (cell for index in self.work.running for cell in self.work_items[index].cells):
            for attempt in (cell, at_half_rate(cell)):
                with suppress(ConfigError, FailedError, Timeout, OSError):
                    left = max(1.0, deadline - time.monotonic())
                    claim.close_run(attempt, self.state.store, LADDER_STUDY, status, left, release)

    def _refresh(self) -> None:
        self.state.refresh()
        self._ended = set()
