"""A group of Ray Train workers that stays alive and trains one run group after the other: work in, finished runs out.

The process that calls `train_run_groups` claims the runs: it is the driver of `train`, or a trial of ladder or tune. One
thread runs Ray Train; another one claims the next run group when the workers need it (launch/dispatcher). So between two run
groups nothing starts: processes, imports and process group stay.
"""

from collections.abc import Sequence
from typing import Any

from lmu_dist import background, garbage, records, storage
from lmu_dist.config import Config, FailedError
from lmu_dist.launch.dispatcher import Dispatcher, MetricsListener, Services
from lmu_dist.launch.record import FINAL_STATUSES
from lmu_dist.launch.work_source import WorkSource
from lmu_dist.launch.workers import run_workers

POLL_SECONDS = 1.0  # between two calls of a MetricsListener


def train_run_groups(
    source: WorkSource,
    name: str,
    config: Config,
    services: Services,
    listener: MetricsListener = lambda _: None,
    callbacks: Sequence[Any] = (),
    final_statuses: Sequence[str] = FINAL_STATUSES,
) -> None:
    """Trains the cells of a source in one group of workers, until the source has no more. Resumes from their checkpoints.

    A run group whose workers fail is tried again, `cluster.max_failures` times, then it is reported as failed, and the next one
    starts. Needs a connection to a Ray cluster. `name` is unique among all groups; `config` says what the workers need.
    `callbacks` of Ray Train get a report of every evaluation. Raises FailedError if workers cannot be started.
    """
    dispatcher = Dispatcher(source, name, services, bool(callbacks), final_statuses)
    folder = config.storage_folder / "ray_train" / name
    arguments = {"queue": services.queue, "metrics_logger": services.metrics_logger, "group": name}
    status = records.INTERRUPTED
    try:
        with dispatcher.dispatching(), background.repeated(lambda: dispatcher.poll(listener), POLL_SECONDS):
            while dispatcher.has_work():
                try:
                    run_workers(_train, arguments, config, folder, 0, callbacks)
                except FailedError as e:
                    status = records.FAILED
                    dispatcher.note_failure(e)
                    status = records.INTERRUPTED
    finally:
        dispatcher.close(status)
        storage.remove(folder)


def _train(arguments: dict[str, Any]) -> None:
    """The function of a worker."""
    garbage.collect_rarely()
    from lmu_dist.launch.worker import train_worker  # needs torch, which this process, and Ray's controller, do without

    train_worker(**arguments)
