"""Exactly-once execution: whether a cell has ended, whether another driver trains it, and which MLflow run it has.

Drivers that share a disk exclude each other by a file lock on the trunk's folder. Drivers that share only an MLflow store, or a
storage at a URI, exclude each other by the heartbeat that the MLflowUploader of a run writes to MLflow. So a run whose storage
is at a URI cannot start without MLflow. Elsewhere it can, and the uploader makes its MLflow run later. Called by metrics_logger
for the run groups, and by trainer, ladder and tune.
"""

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from filelock import Timeout

from lmu_dist import records
from lmu_dist.config import Config, ConfigError, FailedError, Folder
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.locks import metrics_log_lock, owner_id, run_identity, trunk_lock
from lmu_dist.launch.record import (
    FINAL_STATUSES,
    FinishedRun,
    Outcome,
    log_result,
    notes,
    read_record,
    record_of_cell,
    record_path,
    write_record,
)
from lmu_dist.storage import is_remote, make_folder
from lmu_dist.tracking import studies
from lmu_dist.tracking.errors import BusyError, MLflowUnavailableError, OwnerUnresponsiveError, one_line
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.new_run import create_run_of
from lmu_dist.tracking.owner import HEARTBEAT_TIMEOUT_SECONDS, heartbeat_now, owner_id_of
from lmu_dist.tracking.run_file import save_run_id, saved_run_id
from lmu_dist.tracking.run_identity import LoggedRun
from lmu_dist.tracking.runs import KnownRuns, find_run, record_of, retire_run
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.tags import CLAIM, FOLDER, HEARTBEAT, OWNER_ID, RESTORED_FROM
from lmu_dist.tracking.upload import MLflowUploader, upload

logger = logging.getLogger(__name__)

LOG_LOCK_SECONDS = 60.0  # how long an upload waits for another process that writes the same metrics log
CLAIM_SECONDS = 2.0  # after which each of two drivers that claim a run at the same moment sees whose claim MLflow has
CLOSING_SECONDS = 15.0  # how long closing the MLflow run of a cell that cannot go on may take
EXIT_TIMEOUT_SECONDS = 60.0  # how long the processes of a stopped run may take to exit


def check_store(store: Store, config: Config) -> None:
    """Checks that MLflow answers. Raises ConfigError if it refuses, MLflowUnavailableError if it is needed and does not answer.

    Where file locks exclude other drivers it is not needed: a warning says that the metrics are uploaded later.
    """
    try:
        store.check()
    except MLflowUnavailableError as e:
        if is_remote(config.storage_folder):
            raise
        logger.warning("%s. The command goes on: it logs to files, and uploads them when MLflow answers", e)


def start_study(store: Store, config: Config, study: str) -> None:
    """Marks the parent run of a study in MLflow as running. Does nothing while MLflow is unavailable."""
    with suppress(MLflowUnavailableError, ConfigError, OSError):  # what is wrong is reported when the run of a cell is made
        studies.start_study(store, config.experiment, study)


def end_study(store: Store, config: Config, study: str, status: str = "FINISHED", known: KnownRuns | None = None) -> None:
    """Ends the parent run of a study in MLflow, with a table of its cells. Does nothing while MLflow is unavailable.

    `known`: the runs of the cells, if the caller has just read them.
    """
    # The next start of the command ends it. MLflow's client writes temporary files, and its artifacts may be on another disk.
    with suppress(MLflowUnavailableError, ConfigError, OSError):
        studies.end_study(store, config.experiment, study, status, known)


def claim_runs(
    cells: Sequence[Cell], store: Store, study: str, final_statuses: Sequence[str]
) -> tuple[dict[str, FinishedRun], tuple[LoggedRun, ...]]:
    """Finds the runs of the cells of a trunk that have ended, by key, and opens MLflow runs for the others, in order.

    The caller holds the lock of the trunk. Raises BusyError if another driver trains a cell, and the errors of `open_run`.
    """
    found = {cell.key: find_finished(cell, store, study, final_statuses=final_statuses) for cell in cells}
    done = {key: run for key, run in found.items() if run is not None}
    missing = [cell for cell in cells if cell.key not in done]
    run_ids = [open_run(cell, store, study) for cell in missing]
    return done, tuple(
        LoggedRun(cell.folder, run_id, run_identity(cell, study), _last_steps(cell, run_id, store))
        for cell, run_id in zip(missing, run_ids, strict=True)
    )


def _last_steps(cell: Cell, run_id: str | None, store: Store) -> dict[str, int]:
    """The last step of each metric that MLflow has of a run whose log is not on this machine."""
    if run_id is None or MetricsLog.is_complete(cell.folder):
        return {}
    try:
        return store.last_steps(run_id)
    except MLflowUnavailableError:
        if is_remote(cell.folder):
            raise
        return {}  # a run in a local folder whose log is missing has logged nothing


def find_finished(
    cell: Cell, store: Store, study: str, known_run: Any = None, final_statuses: Sequence[str] = FINAL_STATUSES
) -> FinishedRun | None:
    """The finished run of a cell, read from its folder, or else from MLflow; None if the cell has not ended.

    Entries of its log that MLflow lacks are uploaded, all of them if this store has no such run, and none if the run in MLflow
    is another one of the same cell. `known_run`: the MLflow run,
    if the caller has it. `final_statuses`: a run that ended with another status counts as not ended.
    """
    if record_path(cell).exists():
        if read_record(cell).status not in final_statuses:
            return None
        record = read_record(cell)
        run_id, remarks = _upload_finished(cell, store, study, known_run)
        return FinishedRun(cell, record, run_id or saved_run_id(cell.folder, store.uri) or "", store.uri, True, remarks)
    try:
        run = find_run(store, cell.key)
    except MLflowUnavailableError:
        if not _can_start_without_mlflow(cell, store):
            raise
        return None  # not ended here; it can be trained while MLflow is unavailable
    return finished_in_mlflow(cell, run, store, final_statuses)


def _upload_finished(cell: Cell, store: Store, study: str, known_run: Any) -> tuple[str | None, tuple[str, ...]]:
    """Uploads what MLflow lacks of the run that ended in the cell's folder. Returns the id of the cell's run, and notes."""
    run = known_run
    if run is None:
        with suppress(MLflowUnavailableError):
            run = find_run(store, cell.key)
    if run is not None and not is_run_of(cell, run, owner_id(cell)):
        run_id = run.info.run_id
        note = (
            f"the metrics of {cell.folder} are not in MLflow, which has another run of the cell, from {owner_id_of(run)}; to "
            f"upload them delete that run (`mlflow runs delete --run-id {run_id}`), then start the same command again"
        )
        return run_id, (note,) if any(MetricsLog(cell.folder, run_id).pending()) else ()
    run_id = known_run.info.run_id if known_run else open_run(cell, store, study)
    return run_id, upload_log(cell, run_id, store, study)


def is_run_of(cell: Cell, run: Any, own_id: str) -> bool:
    """Whether an MLflow run is the one that the log in the cell's folder was written for: metrics of two runs do not mix.

    A folder at a URI is one for all owners. A local one may have the same path on two machines. `own_id`: the `owner_id` here.
    """
    if owner_id_of(run) in (None, own_id):
        return True
    return is_remote(cell.config.storage_folder) and run.data.tags.get(FOLDER) == str(cell.folder)


def finished_in_mlflow(
    cell: Cell, run: Any, store: Store, final_statuses: Sequence[str] = FINAL_STATUSES, is_here: bool | None = None
) -> FinishedRun | None:
    """The finished run of a cell by its MLflow run; None if there is no such run or it has not ended.

    `is_here`: whether the cell's folder exists, if the caller knows.
    """
    record = record_of(run) if run else None
    if run is None or record is None or record.status not in final_statuses:
        return None
    run_folder = run.data.tags.get(FOLDER)
    note = f"MLflow has this run as ended in {run_folder}, which is not here; to train it again delete the run in MLflow"
    is_here = cell.folder.is_dir() if is_here is None else is_here
    is_expected_here = RESTORED_FROM not in run.data.tags  # a table of records brings no folder
    return FinishedRun(cell, record, run.info.run_id, store.uri, True, (note,) if is_expected_here and not is_here else ())


def upload_log(cell: Cell, run_id: str | None, store: Store, study: str) -> tuple[str, ...]:
    """Uploads the pending entries of a run that is not being trained. Returns notes: why some are not in MLflow.

    Tries once, since a command may ask this of each of many cells during an outage.
    """
    log = MetricsLog(cell.folder, run_id)
    if not any(log.pending()):
        return notes([], "", log.notes())
    try:
        with metrics_log_lock(cell.folder).acquire(timeout=LOG_LOCK_SECONDS):
            upload(log, store, run_identity(cell, study))
            return notes([], "", log.notes())
    except Timeout:
        reason = "another process is uploading it"
    except Exception as e:  # noqa: BLE001 - databases and object stores behind MLflow raise errors of their own
        reason = one_line(e) or type(e).__name__
    return notes([], reason, log.notes())


def close_run(
    cell: Cell,
    store: Store,
    study: str,
    outcome: str | Outcome,
    timeout_seconds: float = EXIT_TIMEOUT_SECONDS,
    release_log: Callable[[Folder], None] = lambda _: None,
) -> None:
    """Closes the MLflow run of a cell whose workers are dead. A status closes it until a later start; an Outcome ends the cell.

    Waits until the process that claimed the run has exited and nobody writes its log; raises Timeout if they do not. Entries
    that MLflow does not take in time stay in the metrics log. `release_log` makes a metrics logger that lives on close the log.
    """
    run_id = saved_run_id(cell.folder, store.uri)
    if run_id is None and not MetricsLog.exists(cell.folder):
        return  # it was never started
    if not _is_owner(cell, run_id, store):
        return
    with ExitStack() as locks:
        locks.enter_context(trunk_lock(cell.trunk_folder, timeout_seconds))
        release_log(cell.folder)
        locks.enter_context(metrics_log_lock(cell.folder).acquire(timeout=timeout_seconds))
        if record_path(cell).exists():
            return
        log = MetricsLog(cell.folder, run_id)
        if isinstance(outcome, Outcome):
            record = record_of_cell(cell, outcome)
            log_result(record, outcome.evaluation, log)
            log.end_run(outcome.status)
            log.flush()
            write_record(cell, record)
        else:
            log.set_tags({"lmu.status": outcome})
            log.end_run(outcome)
        log.copy_to_storage()
        MLflowUploader(log, store.uri, run_identity(cell, study)).close(timeout_seconds)


def close_failed(cells: Sequence[Cell], store: Store, study: str) -> None:
    """Closes the MLflow runs of cells that cannot go on, as far as possible: the caller has the error to report."""
    for cell in cells:
        with suppress(ConfigError, FailedError, Timeout, OSError):
            close_run(cell, store, study, records.FAILED, CLOSING_SECONDS)


def open_run(cell: Cell, store: Store, study: str) -> str | None:
    """The id of the cell's MLflow run: the one it has, or a new one under the study of its experiment.

    If MLflow is unavailable, returns the id from an earlier start, or else None: the metrics log is uploaded later. Raises
    MLflowUnavailableError instead if no file lock shows whether another driver is training the cell. Raises BusyError if a
    driver with another storage is.
    """
    make_folder(cell.folder)
    try:
        run = find_run(store, cell.key)
        if run is not None and _is_running_elsewhere(cell, run):
            raise OwnerUnresponsiveError(f"{cell.name} is being run in {owner_id_of(run)}; wait for it")
        if run is not None and RESTORED_FROM in run.data.tags:
            retire_run(store, run.info.run_id)  # it has no checkpoint to go on from, and its metrics are not this training's
            run = None
        if run is not None:
            run_id = run.info.run_id
            if owner_id_of(run) not in (None, owner_id(cell)):
                _take_over(cell, run_id, store)
        else:
            run_id = create_run_of(store, run_identity(cell, study))
    except MLflowUnavailableError:
        if not _can_start_without_mlflow(cell, store):
            raise
        return saved_run_id(cell.folder, store.uri)
    save_run_id(cell.folder, store.uri, run_id)
    return run_id


def _can_start_without_mlflow(cell: Cell, store: Store) -> bool:
    """Whether file locks exclude other drivers, or the cell was started here before."""
    return not is_remote(cell.config.storage_folder) or saved_run_id(cell.folder, store.uri) is not None


def _take_over(cell: Cell, run_id: str, store: Store) -> None:
    """Takes over a run that another owner abandoned. Raises BusyError if another driver takes it over at the same moment."""
    claim = uuid.uuid4().hex
    store.set_tags(run_id, {CLAIM: claim, FOLDER: str(cell.folder), OWNER_ID: owner_id(cell), HEARTBEAT: heartbeat_now()})
    time.sleep(CLAIM_SECONDS)
    if store.get_tag(run_id, CLAIM) != claim:
        raise BusyError(f"{cell.name} was taken over by another driver; wait for it")
    if not is_remote(cell.folder) and MetricsLog.exists(cell.folder):
        _leave_out_logged(cell, run_id, store.last_steps(run_id))


def _leave_out_logged(cell: Cell, run_id: str, last_steps: dict[str, int]) -> None:
    """Leaves the steps that another owner has logged to MLflow out of the cell's own log, where they are pending or come again.

    `last_steps`: the last step of each metric in MLflow.
    """
    log = MetricsLog(cell.folder, run_id, last_steps)
    position = 0  # in bytes, after the last of the steps that MLflow has
    for end, entry in log.pending():
        if entry["kind"] == "metrics" and all(entry["step"] <= last_steps.get(key, -1) for key in entry["values"]):
            position = end
    if position:
        log.mark_uploaded(position)


def _is_running_elsewhere(cell: Cell, run: Any) -> bool:
    """Whether a driver with another owner id has the run and its last heartbeat is recent."""
    tags = run.data.tags
    heartbeat, ended = float(tags.get(HEARTBEAT, "0")) / 1000, tags.get("lmu.status") in records.ENDED
    is_recent = time.time() - heartbeat < HEARTBEAT_TIMEOUT_SECONDS
    return not ended and owner_id_of(run) not in (None, owner_id(cell)) and is_recent


def check_not_running_elsewhere(cell: Cell, run: Any) -> None:
    """Raises BusyError if a driver whose file locks this process cannot see is training the MLflow run of a cell."""
    if _is_running_elsewhere(cell, run):
        raise BusyError(f"{cell.name} is being run in {owner_id_of(run)}; wait for it, or stop it there")


def _is_owner(cell: Cell, run_id: str | None, store: Store) -> bool:
    """Whether the run belongs to this owner id. True while MLflow is unavailable, or has no such run."""
    try:
        return run_id is None or store.get_tag(run_id, OWNER_ID) in (None, "", owner_id(cell))
    except MLflowUnavailableError:
        return True
