"""Claims the runs of a run group: cells of one trunk in, locks and MLflow runs while it is trained, finished runs out.

Called by worker_group, in the process that claims runs: the driver of `train`, and the trials of ladder and tune. The
metrics logger finds and opens the runs in MLflow, so that such a process need not import it.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayError

from lmu_dist import records, storage
from lmu_dist.config import ConfigError, FailedError
from lmu_dist.data.manifest import TOKENIZER
from lmu_dist.launch import tidy
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.locks import exclusive_lock
from lmu_dist.launch.metrics_logger import LOCK_SECONDS, MetricsLogger, RemoteRunLogger, UploadState, close_logs, release_log
from lmu_dist.launch.record import FINAL_STATUSES, FinishedRun, log_start, notes, read_record, record_path
from lmu_dist.launch.work_queue import RunGroup
from lmu_dist.models.family_source import FAMILY_CODE
from lmu_dist.tracking.errors import BusyError
from lmu_dist.tracking.run_file import saved_run_id
from lmu_dist.tracking.run_identity import LoggedRun
from lmu_dist.train import checkpoint

UPLOAD_TIMEOUT_SECONDS = 60.0  # how long the end of a run group waits for MLflow; the next start uploads the rest


class ClaimedRunGroup:
    """Cells of one trunk that this process may train, until `close`.

    Cells that ended earlier are in `done`; the others, in `cells`, have MLflow runs and open metrics logs. Raises BusyError if
    another driver trains the trunk, ConfigError, FailedError.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        tracking_uri: str,
        study: str,
        metrics_logger: ActorProxy[MetricsLogger],
        final_statuses: Sequence[str] = FINAL_STATUSES,
    ) -> None:
        """`final_statuses`: a run that ended with another status is continued."""
        self._tracking_uri, self._metrics_logger, self.all_cells = tracking_uri, metrics_logger, tuple(cells)
        try:
            self._skipped_checkpoints = skipped_checkpoints(cells)
        except BusyError:
            raise
        except ConfigError:
            with suppress(RayError):
                ray.get(metrics_logger.close_failed.remote(cells, study))
            raise
        self.runs: tuple[LoggedRun, ...] = ()
        self._lock = ExitStack()
        self._lock.enter_context(exclusive_lock(cells[0]))
        try:
            self.done, runs = ray.get(metrics_logger.claim.remote(cells, study, final_statuses))
            self.cells = tuple(cell for cell in cells if cell.key not in self.done)
            for cell in self.cells:
                _prepare_folder(cell)
            self.runs = runs
            self._log_start()
        except BaseException:
            try:
                self._end_unfinished(records.INTERRUPTED)
            finally:
                self._release()
            raise

    def _log_start(self) -> None:
        loggers = [RemoteRunLogger(self._metrics_logger, run) for run in self.runs]
        for cell, run, logger in zip(self.cells, self.runs, loggers, strict=True):
            deadline = time.monotonic() + LOCK_SECONDS
            while not ray.get(self._metrics_logger.is_free.remote(run)):
                if time.monotonic() > deadline:
                    raise BusyError(f"{cell.name} is still being logged by a process of an earlier command; wait for it")
                time.sleep(0.5)
            log_start(cell, logger)
        for logger in loggers:  # before the workers, which log through calls of their own
            logger.flush()

    def run_group(self, report_to_tune: bool) -> RunGroup:
        """What the workers need to know."""
        return RunGroup(self.cells, self.runs, report_to_tune)

    @property
    def has_ended(self) -> bool:
        """Whether every cell has a record."""
        return all(record_path(cell).exists() for cell in self.cells)

    def finished(self) -> list[FinishedRun]:
        """The runs of the cells that have ended, in the order of the cells."""
        for cell, run in zip(self.cells, self.runs, strict=True):
            if cell.key not in self.done and record_path(cell).exists():
                run_id = run.run_id or saved_run_id(cell.folder, self._tracking_uri) or ""
                self.done[cell.key] = FinishedRun(cell, read_record(cell), run_id, self._tracking_uri, False, ())
        return [self.done[cell.key] for cell in self.all_cells if cell.key in self.done]

    def close(self, status: str) -> list[FinishedRun]:
        """Waits for the uploads and releases the trunk. A run without a record is ended with this status.

        Returns the runs of the cells that have ended, in the order of the cells.
        """
        states = [UploadState("the process that uploads the metrics is gone", [])] * len(self.runs)
        try:
            self._end_unfinished(status)
            with suppress(RayError):
                states = close_logs(self._metrics_logger, self.runs, UPLOAD_TIMEOUT_SECONDS)
            tidy.after_run(self.all_cells)
        finally:
            self._release()
        warnings = {
            cell.key: notes(self._skipped_checkpoints[cell.key], state.not_uploaded, state.notes)
            for cell, state in zip(self.cells, states, strict=True)
        }
        return [replace(run, notes=warnings.get(run.cell.key, run.notes)) for run in self.finished()]

    def _end_unfinished(self, status: str) -> None:
        """Ends the MLflow runs of the cells that have no record."""
        for cell, run in zip(self.cells if self.runs else (), self.runs, strict=True):
            # The disk is full or a storage fails: the error of the workers is the one to report.
            with suppress(RayError, FailedError):
                if not record_path(cell).exists():
                    logger = RemoteRunLogger(self._metrics_logger, run)
                    logger.set_tags({"lmu.status": status})
                    logger.end_run(status)
                    logger.flush()

    def _release(self) -> None:
        try:
            for run in self.runs:
                release_log(self._metrics_logger, run.folder)
        finally:
            self._lock.close()


def skipped_checkpoints(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """The damaged checkpoints of the cells of a trunk that will be skipped, by key. A cell that has ended needs none.

    Raises ConfigError if a cell cannot go on, as all its checkpoints are damaged or have another ZeRO stage, BusyError if
    another driver is writing checkpoints.
    """
    with exclusive_lock(cells[0]):
        return {cell.key: [] if record_path(cell).exists() else _skipped_checkpoints(cell) for cell in cells}


def _skipped_checkpoints(cell: Cell) -> list[str]:
    path, meta, skipped = checkpoint.newest_intact(cell.folder)
    if meta is not None and not checkpoint.is_loadable(meta, cell.config.cluster.zero_stage):
        raise ConfigError(
            f"{path} was written at ZeRO stage {meta.zero_stage}, and only stages 1 and 2 can read each other; go on "
            f"with cluster.zero_stage={meta.zero_stage} (in a ladder, by ladder.workers)"
        )
    return skipped


def _prepare_folder(cell: Cell) -> None:
    """Writes what a run's folder has from its start on."""
    record_path(cell).unlink(missing_ok=True)  # left by a run that was stopped early and is now continued
    storage.write_atomic(cell.folder / TOKENIZER, (cell.corpus.folder / TOKENIZER).read_bytes())
    if cell.family_source is not None:
        storage.write_atomic(cell.folder / FAMILY_CODE, cell.family_source.text.encode())
    checkpoint.prune(cell.folder, cell.config.cluster.keep_checkpoints)
