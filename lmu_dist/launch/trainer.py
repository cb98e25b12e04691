"""The driver of `lmu-dist train`: trains and records the run of a Config. Starts a local Ray cluster if none is given.

Progress goes to callbacks; nothing here prints.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from lmu_dist import records
from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.data.manifest import is_prepared
from lmu_dist.data.progress import Progress
from lmu_dist.launch import claim
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.cluster import check_before_start, cluster
from lmu_dist.launch.corpus import prepare_corpus
from lmu_dist.launch.dispatcher import MetricsListener, Services
from lmu_dist.launch.metrics_logger import start_metrics_logger
from lmu_dist.launch.new_cell import log_repeats, make_cell
from lmu_dist.launch.record import FinishedRun
from lmu_dist.launch.run_group import skipped_checkpoints
from lmu_dist.launch.work_queue import start_work_queue
from lmu_dist.launch.work_source import OneTrunk
from lmu_dist.launch.worker_group import train_run_groups
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import shape_of
from lmu_dist.planning.recipes import with_recipe
from lmu_dist.tracking.errors import BusyError, MLflowUnavailableError, OwnerUnresponsiveError
from lmu_dist.tracking.owner import HEARTBEAT_TIMEOUT_SECONDS
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.upload import set_client_limits

STUDY = "train"
POLL_SECONDS = 5.0  # between two checks whether another driver is still alive


def train(
    config: Config, tracking_uri: str, progress: Progress = lambda *_: None, listener: MetricsListener = lambda _: None
) -> FinishedRun:
    """Prepares the data if needed, trains the cell, and returns its record. Raises ConfigError, FailedError.

    Resumes from the newest checkpoint. A cell that has ended is not trained again: the rest of its metrics log is uploaded, and
    its record is returned.
    """
    set_client_limits()
    config, store = with_recipe(config), Store(tracking_uri)
    check_before_start([config])
    try:
        claim.check_store(store, config)
    except MLflowUnavailableError:
        if not is_prepared(config.data, config.storage_folder):
            raise  # before hours of preparing; a run that MLflow has already can be resumed without MLflow
    shape_of(config, vocab_tokens(config))  # refuses an impossible size before the corpus is prepared
    cell = make_cell(config, prepare_corpus(config, progress))
    cell.corpus.tokenizer()
    if (finished := claim.find_finished(cell, store, STUDY)) is not None:
        claim.end_study(store, config, STUDY, _study_status(finished))
        return finished
    log_repeats([cell])
    with _ends_study(store, config):
        _check_resumable(cell, store)
    deadline = time.monotonic() + HEARTBEAT_TIMEOUT_SECONDS + POLL_SECONDS
    with cluster([config]):
        while True:
            try:
                with _ends_study(store, config):
                    claim.start_study(store, config, STUDY)
                    finished = _train(cell, store, listener)
                claim.end_study(store, config, STUDY, _study_status(finished))
                return finished
            except OwnerUnresponsiveError:
                if time.monotonic() > deadline:
                    raise
                progress("waiting for another driver to end or time out", 0, 1)
                time.sleep(POLL_SECONDS)


def _train(cell: Cell, store: Store, listener: MetricsListener) -> FinishedRun:
    node_id, source = ray.get_runtime_context().get_node_id(), OneTrunk([cell])
    services = Services(store.uri, STUDY, start_metrics_logger(store.uri, node_id), start_work_queue([], 0, node_id))
    train_run_groups(source, f"train-{time.time_ns():x}", cell.config, services, listener)
    [finished] = source.result()
    return finished


def _check_resumable(cell: Cell, store: Store) -> None:
    """Raises ConfigError if the cell cannot go on from its checkpoints, before Ray is started."""
    try:
        skipped_checkpoints([cell])
    except BusyError:
        raise
    except ConfigError:
        claim.close_failed([cell], store, STUDY)
        raise


@contextmanager
def _ends_study(store: Store, config: Config) -> Iterator[None]:
    """Ends the study in MLflow if the block raises: as FAILED, or as KILLED after Ctrl-C or SIGTERM."""
    try:
        yield
    except BusyError:
        raise  # another driver trains the cell, and ends the study
    except BaseException as e:
        claim.end_study(store, config, STUDY, "FAILED" if isinstance(e, ConfigError | FailedError) else "KILLED")
        raise


def _study_status(finished: FinishedRun) -> str:
    return "FAILED" if finished.record.status == records.DIVERGED else "FINISHED"
