"""Gives run groups to a group of workers: claims the next one when the workers ask, and closes those that have ended.

Works in threads of the process that claims runs. Called by worker_group.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayActorError, RayError, RayTaskError

from lmu_dist import background, records
from lmu_dist.config import FailedError
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.metrics_logger import MetricsLogger
from lmu_dist.launch.run_group import ClaimedRunGroup
from lmu_dist.launch.work_queue import WorkQueue
from lmu_dist.launch.work_source import WorkSource
from lmu_dist.launch.workers import CannotStartError
from lmu_dist.tracking.errors import one_line

AHEAD_SECONDS = 5.0  # before the end of a run group, when the next one is claimed. Until then other groups may take it.
GONE, QUEUE_GONE = "the process that records metrics is gone", "the process that hands out run groups is gone"
N_CLOSERS = 8  # run groups whose last metrics are uploaded at the same time, in an outage of MLflow

MetricsListener = Callable[[dict[str, float]], None]  # called about once a second with the newest metrics, if there are any


@dataclass(frozen=True)
class Services:
    """The actors and the store of a driver."""

    tracking_uri: str
    study: str
    metrics_logger: ActorProxy[MetricsLogger]
    queue: ActorProxy[WorkQueue]


def _seconds_left(claimed: ClaimedRunGroup, latest: dict[str, float]) -> float:
    """Seconds until the last cell of a run group has taken its last step, by its newest metrics; infinity if it has none."""
    if records.TOKENS_PER_SECOND not in latest:
        return math.inf
    train = claimed.cells[-1].config.train
    return (train.n_steps - 1 - latest["step"]) * train.batch_tokens / latest[records.TOKENS_PER_SECOND]


class Dispatcher:
    """Gives run groups to the workers of one group, in a thread of its own, and closes those that have ended."""

    def __init__(
        self, source: WorkSource, name: str, services: Services, report_to_tune: bool, final_statuses: Sequence[str]
    ) -> None:
        self._source, self._name, self._services = source, name, services
        self._report_to_tune, self._final_statuses = report_to_tune, final_statuses
        self._state = threading.RLock()  # of the attributes below
        self._error: Exception | None = None
        self._current: ClaimedRunGroup | None = None
        self._ahead: ClaimedRunGroup | None = None  # claimed while the current one is about to end
        self._retries = list[Sequence[Cell]]()
        self._n_failures = 0  # of the current run group
        self._closers = ThreadPoolExecutor(N_CLOSERS, thread_name_prefix="close-runs")

    @contextmanager
    def dispatching(self) -> Iterator[None]:
        """Answers the workers, in a thread, until the block ends. Raises what the thread raised."""
        with background.running(self._serve_workers):
            try:
                yield
            finally:
                with suppress(RayError):
                    ray.get(self._services.queue.close.remote(self._name))
        if self._error is not None:
            raise self._error

    def has_work(self) -> bool:
        """Whether there is a run group to train. It is claimed, so that workers are started for it and not in vain."""
        with self._state:
            return self._error is None and self._next() is not None

    def _serve_workers(self) -> None:
        queue = self._services.queue
        try:
            while ray.get(queue.workers_are_ready.remote(self._name)):
                with self._state:
                    current = self._next()
                    ray.get(queue.assign.remote(self._name, current and current.run_group(self._report_to_tune)))
        except Exception as e:  # noqa: BLE001 - the workers would wait for ever
            self._error = FailedError(f"{QUEUE_GONE}: {one_line(e)}") if isinstance(e, RayError) else e
            with suppress(RayError):
                ray.get(queue.assign.remote(self._name, None))

    def poll(self, listener: MetricsListener) -> None:
        """Gives the newest metrics to the listener, and claims the next run group if the current one is about to end."""
        current = self._current
        if current is None:
            return
        with suppress(RayError):
            latest = self._services.metrics_logger.latest
            if newest := ray.get(latest.remote([run.folder for run in current.runs])):
                listener(newest)
            if _seconds_left(current, ray.get(latest.remote([current.runs[-1].folder]))) < AHEAD_SECONDS:
                with self._state:
                    if self._current is current and self._ahead is None and not self._retries:
                        self._ahead = self._claim_from_source()

    def note_failure(self, error: FailedError) -> None:
        """Notes that the workers failed. Raises the error if they cannot be started again."""
        with self._state:
            current, is_fatal = self._current, isinstance(error, CannotStartError)
            if current is not None and not current.has_ended:
                self._n_failures += 1
                if is_fatal or self._n_failures > current.cells[0].config.cluster.max_failures:
                    self._end_current(records.FAILED, error)
            if is_fatal:
                raise error

    def close(self, status: str) -> None:
        """Ends the current run group with this status, if it has not ended, and waits until all are closed.

        A run group that was claimed ahead goes back to the source.
        """
        with self._state:
            if self._current is not None:
                self._end_current(status)
            if self._ahead is not None:
                self._close_later(self._ahead, records.INTERRUPTED, put_back=True)
                self._ahead = None
        self._closers.shutdown()

    def _next(self) -> ClaimedRunGroup | None:
        """The run group to train now: again the current one, if its workers were started again, or a new one."""
        if self._current is not None:
            if not self._current.has_ended:
                return self._current
            self._end_current(records.COMPLETE)
        while self._current is None:
            if self._retries:
                self._current = self._claim(self._retries.pop(0))
            elif self._ahead is not None:
                self._current, self._ahead = self._ahead, None
            elif (cells := self._source.next()) is not None:
                self._current = self._claim(cells)
            else:
                break
        return self._current

    def _claim_from_source(self) -> ClaimedRunGroup | None:
        """The first run group of the source that can be claimed and has something to train; None if there is none."""
        while (cells := self._source.next()) is not None:
            if (claimed := self._claim(cells)) is not None:
                return claimed
        return None

    def _claim(self, cells: Sequence[Cell]) -> ClaimedRunGroup | None:
        services = self._services
        try:
            claimed = ClaimedRunGroup(
                cells, services.tracking_uri, services.study, services.metrics_logger, self._final_statuses
            )
        except RayActorError as e:
            self._source.failed(cells, FailedError(GONE))
            raise FailedError(f"{GONE}: {one_line(e)}") from e
        except Exception as e:  # noqa: BLE001 - clients of object stores raise errors of their own
            self._source.failed(cells, e.cause if isinstance(e, RayTaskError) else e)
            return None
        if claimed.cells:
            return claimed
        self._close_later(claimed, records.COMPLETE)  # all have ended before
        return None

    def _end_current(self, status: str, error: Exception | None = None) -> None:
        current, self._current, self._n_failures = self._current, None, 0
        assert current is not None
        self._close_later(current, status, error)

    def _close_later(
        self, claimed: ClaimedRunGroup, status: str, error: Exception | None = None, put_back: bool = False
    ) -> None:
        """Closes a run group, in another thread: the upload of its last metrics may take longer than a small run."""
        if status == records.COMPLETE and (retry := self._source.retry(claimed.finished())):
            self._retries.append(retry)

        def close() -> None:
            try:
                finished = claimed.close(status)
            except Exception as e:  # noqa: BLE001 - nobody asks for the result of this function
                self._source.failed(claimed.all_cells, e)
                return
            if put_back:
                self._source.put_back(claimed.all_cells)
            elif len(finished) == len(claimed.all_cells):
                self._source.ended(finished)
            else:
                self._source.failed(claimed.all_cells, error or FailedError("it was interrupted"))

        self._closers.submit(close)
