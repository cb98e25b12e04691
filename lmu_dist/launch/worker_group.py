"""A group of Ray Train workers that stays alive and trains one run group after the other: work in, finished runs out.

The process that calls `train_run_groups` claims the runs: it is the driver of `train`, or a trial of ladder or tune. Its main
thread runs Ray Train; another one claims the next run group whenever the workers ask for it (launch/work_queue). So between two
run groups nothing starts: processes, imports, process group and compiled operators stay.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayError

from lmu_dist import background, records, storage
from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.launch import claim
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.claim import BusyError, FinishedRun
from lmu_dist.launch.metrics_logger import MetricsLogger
from lmu_dist.launch.run_group import ClaimedRunGroup
from lmu_dist.launch.work_queue import WorkQueue
from lmu_dist.launch.workers import CannotStartError, run_workers
from lmu_dist.tracking.store import MLflowUnavailableError, Store, one_line

POLL_SECONDS = 1.0  # between two calls of a MetricsListener
MOST_START_FAILURES = 3  # of workers that failed before they asked for work
N_CLOSERS = 8  # run groups whose last metrics are uploaded at the same time, in an outage of MLflow

MetricsListener = Callable[[dict[str, float]], None]  # called about once a second with the newest metrics, if there are any


@runtime_checkable
class WorkSource(Protocol):
    """Where a group of workers gets its work, and what it reports. Called from several threads."""

    def next(self) -> Sequence[Cell] | None:
        """The cells of the next trunk, fewest tokens first; None if there is none."""
        ...

    def retry(self, finished: Sequence[FinishedRun]) -> Sequence[Cell]:
        """The cells to train at once because of how these cells of a trunk ended; usually none."""
        ...

    def ended(self, finished: Sequence[FinishedRun]) -> None:
        """The cells of a trunk have ended, and MLflow has their metrics or cannot be reached."""

    def failed(self, cells: Sequence[Cell], error: Exception) -> None:
        """The cells of a trunk could not be trained."""


class OneTrunk:
    """A WorkSource of one trunk, whose result the caller asks for."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells: Sequence[Cell] | None = cells
        self._finished: Sequence[FinishedRun] = ()
        self._error: Exception | None = None

    def next(self) -> Sequence[Cell] | None:
        """The cells, once."""
        cells, self._cells = self._cells, None
        return cells

    def retry(self, finished: Sequence[FinishedRun]) -> Sequence[Cell]:
        """None: the caller sees how they ended."""
        return ()

    def ended(self, finished: Sequence[FinishedRun]) -> None:
        """Keeps the result."""
        self._finished = finished

    def failed(self, cells: Sequence[Cell], error: Exception) -> None:
        """Keeps the error."""
        self._error = error

    def result(self) -> Sequence[FinishedRun]:
        """The finished runs of the cells. Raises the error with which they failed."""
        if self._error is not None:
            raise self._error
        return self._finished


@dataclass(frozen=True)
class Services:
    """The actors and the store of a driver."""

    store: Store
    study: str
    metrics_logger: ActorProxy[MetricsLogger]
    queue: ActorProxy[WorkQueue]


def train_run_groups(
    source: WorkSource,
    name: str,
    config: Config,
    services: Services,
    listener: MetricsListener = lambda _: None,
    callbacks: Sequence[Any] = (),
    final_statuses: Sequence[str] = claim.FINAL_STATUSES,
) -> None:
    """Trains the cells of a source in one group of workers, until the source has no more. Resumes from their checkpoints.

    A run group whose workers fail is tried again, `cluster.max_failures` times, then it is reported as failed, and the next one
    starts. Needs a connection to a Ray cluster. `name` is unique among all groups; `config` says what the workers need.
    `callbacks` of Ray Train get a report of every evaluation. Raises FailedError if workers cannot be started.
    """
    feeder = _Feeder(source, name, services, bool(callbacks), final_statuses)
    folder = config.storage_folder / "ray_train" / name
    arguments = {"queue": services.queue, "metrics_logger": services.metrics_logger, "group": name}
    status = records.INTERRUPTED
    try:
        with feeder.feeding(), background.repeated(lambda: listener(feeder.latest()), POLL_SECONDS):
            while not feeder.is_done:
                try:
                    run_workers(_train, arguments, config, folder, callbacks)
                except FailedError as e:
                    status = records.FAILED
                    feeder.note_failure(e)
                    status = records.INTERRUPTED
    finally:
        feeder.close(status)
        storage.remove(folder)


def _train(arguments: dict[str, Any]) -> None:
    """The function of a worker."""
    from lmu_dist.launch.worker import train_worker  # needs torch, which this process, and Ray's controller, do without

    train_worker(**arguments)


class _Feeder:
    """Gives run groups to the workers of one group, in a thread of its own, and closes those that have ended."""

    def __init__(
        self, source: WorkSource, name: str, services: Services, report_to_tune: bool, final_statuses: Sequence[str]
    ) -> None:
        self._source, self._name, self._services = source, name, services
        self._report_to_tune, self._final_statuses = report_to_tune, final_statuses
        self._state = threading.RLock()  # of the attributes below
        self.is_done = False  # whether the source has no more, or this object has failed
        self._error: Exception | None = None
        self._current: ClaimedRunGroup | None = None
        self._retries: Sequence[Cell] = ()
        self._n_failures = 0  # of the current run group, or of workers that have none
        self._closers = ThreadPoolExecutor(N_CLOSERS, thread_name_prefix="close-runs")

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """Answers the workers, in a thread, until the block ends. Raises what the thread raised."""
        with background.running(self._answer_workers):
            try:
                yield
            finally:
                with suppress(RayError):
                    ray.get(self._services.queue.close.remote(self._name))
        if self._error is not None:
            raise self._error

    def _answer_workers(self) -> None:
        queue = self._services.queue
        try:
            while ray.get(queue.workers_are_ready.remote(self._name)):
                with self._state:
                    current = self._next()
                    ray.get(queue.give.remote(self._name, current and current.run_group(self._report_to_tune)))
        except Exception as e:  # noqa: BLE001 - the workers would wait for ever
            is_ray_error = isinstance(e, RayError)
            self._error = FailedError(f"the process that records metrics is gone: {one_line(e)}") if is_ray_error else e
            self.is_done = True
            with suppress(RayError):
                ray.get(queue.give.remote(self._name, None))

    def latest(self) -> dict[str, float]:
        """The newest metrics of the run group, of the run that was logged last."""
        current = self._current
        if current is None:
            return {}
        with suppress(RayError):
            return ray.get(self._services.metrics_logger.latest.remote([run.folder for run in current.runs]))
        return {}

    def note_failure(self, error: FailedError) -> None:
        """Notes that the workers failed. Raises the error if they cannot be started again."""
        with self._state:
            self._n_failures += 1
            current = self._current
            is_fatal = isinstance(error, CannotStartError)
            if current is not None and not current.has_ended:
                if is_fatal or self._n_failures > current.cells[0].config.cluster.max_failures:
                    self._end_current(records.FAILED, error)
                    self._n_failures = 0
                if is_fatal:
                    raise error
            elif is_fatal or self._n_failures > MOST_START_FAILURES:
                raise error

    def close(self, status: str) -> None:
        """Ends the current run group with this status, if it has not ended, and waits until all are closed."""
        with self._state:
            if self._current is not None:
                self._end_current(status)
        self._closers.shutdown()

    def _next(self) -> ClaimedRunGroup | None:
        """The run group to train now: again the current one, if its workers were started again, or a new one."""
        if self._current is not None:
            if not self._current.has_ended:
                return self._current
            self._end_current(records.COMPLETE)
        self._n_failures = 0
        services = self._services
        while (cells := self._next_cells()) is not None:
            try:
                self._current = ClaimedRunGroup(
                    cells, services.store, services.study, services.metrics_logger, self._final_statuses
                )
            except (BusyError, MLflowUnavailableError, ConfigError, FailedError, OSError) as e:
                self._source.failed(cells, e)
                continue
            if self._current.cells:
                return self._current
            self._end_current(records.COMPLETE)
        self.is_done = True
        return None

    def _next_cells(self) -> Sequence[Cell] | None:
        cells, self._retries = self._retries, ()
        return cells or self._source.next()

    def _end_current(self, status: str, error: Exception | None = None) -> None:
        """Closes the current run group, in another thread: the upload of its last metrics may take longer than a small run."""
        current, self._current = self._current, None
        assert current is not None
        if current.has_ended:
            self._retries = self._source.retry(current.finished())

        def close() -> None:
            try:
                finished = current.close(status)
            except Exception as e:  # noqa: BLE001 - nobody asks for the result of this function
                self._source.failed(current.all_cells, e)
                return
            if len(finished) == len(current.all_cells):
                self._source.ended(finished)
            else:
                self._source.failed(current.all_cells, error or FailedError("it was interrupted"))

        self._closers.submit(close)
