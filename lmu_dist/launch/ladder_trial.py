"""A trial of a ladder: trains the items of a work queue in one group of workers.

A process of its own, which imports neither torch nor MLflow. Started by launch/ladder_driver through Ray Tune; the driver reads
from the queue, and from the cells' folders, what has ended.
"""

import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorProxy

from lmu_dist import records, storage
from lmu_dist.config import Config, ConfigError, FailedError, with_settings
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.dispatcher import Services
from lmu_dist.launch.metrics_logger import MetricsLogger
from lmu_dist.launch.record import FinishedRun
from lmu_dist.launch.work_queue import WorkQueue
from lmu_dist.launch.worker_group import train_run_groups
from lmu_dist.tracking.errors import BusyError, MLflowUnavailableError
from lmu_dist.tracking.tags import LADDER_STUDY


def train_work_items(
    params: dict[str, Any],
    config: Config,
    tracking_uri: str,
    environment: dict[str, str],
    metrics_logger: ActorProxy[MetricsLogger],
    queue: ActorProxy[WorkQueue],
) -> dict[str, Any]:
    """The function of a trial: trains work items, one after the other, in one group of workers."""
    os.environ.update(environment)
    services = Services(tracking_uri, LADDER_STUDY, metrics_logger, queue)
    config = with_settings(config, {"cluster.n_workers": params["n_workers"]})
    source = WorkItems(params["group"], params["n_workers"], queue)
    try:
        train_run_groups(source, params["group"], config, services)
    except (ConfigError, FailedError, OSError) as e:
        return {"error": storage.error_text(e)}
    return {"error": ""}


class WorkItems:
    """The WorkSource of a trial: the items of a work queue. Cells that diverged are retried at half the learning rate."""

    def __init__(self, group: str, n_workers: int, queue: ActorProxy[WorkQueue]) -> None:
        self._group, self._n_workers, self._queue = group, n_workers, queue
        self._index_of_trunk = dict[str, int]()
        self._retried = set[int]()  # items that have ended only when their retry has

    def next(self) -> Sequence[Cell] | None:
        """The cells of the next item for this number of workers."""
        if (item := ray.get(self._queue.take.remote(self._group, self._n_workers))) is None:
            return None
        index, cells = item
        self._index_of_trunk[cells[0].trunk] = index
        return cells

    def retry(self, finished: Sequence[FinishedRun]) -> Sequence[Cell]:
        """The cells that diverged, at half the learning rate; once."""
        diverged = [f.cell for f in finished if f.record.status == records.DIVERGED and not f.cell.retry_of]
        if not diverged:
            return ()
        from lmu_dist.launch.new_cell import at_half_rate  # imports torch, which a trial needs for nothing else

        cells, index = [at_half_rate(cell) for cell in diverged], self._index_of_trunk[diverged[0].trunk]
        self._index_of_trunk[cells[0].trunk] = index
        self._retried.add(index)
        return cells

    def ended(self, finished: Sequence[FinishedRun]) -> None:
        """Tells the queue that an item has ended."""
        cell = finished[0].cell
        index = self._index_of_trunk[cell.trunk]
        if cell.retry_of or index not in self._retried:
            ray.get(self._queue.end.remote(index, "", False))

    def put_back(self, cells: Sequence[Cell]) -> None:
        """Gives an item back to the queue."""
        ray.get(self._queue.put_back.remote(self._index_of_trunk[cells[0].trunk]))

    def failed(self, cells: Sequence[Cell], error: BaseException) -> None:
        """Tells the queue why an item was not trained."""
        index, busy = self._index_of_trunk[cells[0].trunk], isinstance(error, BusyError | MLflowUnavailableError)
        ray.get(self._queue.end.remote(index, storage.error_text(error), busy))
