"""Exactly once: whether a cell has ended, who may work on it, and which MLflow run it is. Called by trainer, ladder, tune.

Drivers that share a disk keep out of each other's way by a lock on the trunk's folder; drivers that share only an MLflow
store, or a storage at a URI, by the sign of life that a run's courier leaves in MLflow.
"""

import json
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from lmu_dist import records
from lmu_dist.config import ConfigError
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.record import Outcome, read_record, record_of_cell, record_path, tell_result, write_record
from lmu_dist.launch.recorder import spool_lock
from lmu_dist.records import RunRecord
from lmu_dist.storage import beside, make_folder, write_whole
from lmu_dist.tracking.delivery import Courier
from lmu_dist.tracking.spool import Spool
from lmu_dist.tracking.store import ALIVE, CLAIM, FOLDER, PLACE, SILENCE_SECONDS, AwayError, Store, alive_now, record_of
from lmu_dist.train import checkpoint

DELIVERY_SECONDS = 60.0  # how long the end of a run waits for MLflow before it leaves the rest to the next start
CLAIM_SECONDS = 2.0  # after which one of two that claim a run at the same moment sees the other
RESULTS = (records.COMPLETE, records.DIVERGED)  # a run that a search stopped early goes on where it is wanted for itself
GONE_SECONDS = 60.0  # how long the processes of a run that was stopped may take to die


class BusyError(ConfigError):
    """Another driver works on the cell."""


class PerhapsGoneError(BusyError):
    """Another driver gave a sign of life a moment ago; if it is gone, SILENCE_SECONDS will tell."""


@dataclass(frozen=True)
class Finished:
    """A run that ended, for the summary."""

    cell: Cell
    record: RunRecord
    run_id: str
    tracking_uri: str
    already_done: bool
    notes: tuple[str, ...]  # what a person should know: checkpoints passed over, a record not yet delivered


def find_done(cell: Cell, store: Store, study: str, known: Any = None, ended: Sequence[str] = RESULTS) -> Finished | None:
    """The finished run of this cell: from its folder, where it is newest, else from MLflow, where others may have put it.

    What MLflow has not heard yet is delivered; all of it, if this store never knew the run. `known`: the MLflow run, if the
    caller has looked already. `ended`: the statuses that count; a run with another goes on.
    """
    if record_path(cell).exists():
        if read_record(cell).status not in ended:
            return None
        record, run_id = read_record(cell), known.info.run_id if known else open_run(cell, store, study)
        return Finished(cell, record, run_id, store.uri, True, notes([], deliver(cell, run_id, store)))
    try:
        run = store.find_run(cell.key)
    except ConfigError:
        if _remembered(cell, store) is None:
            raise
        return None  # begun here and not ended; the record of it can wait
    return finished_elsewhere(cell, run, store, ended)


def finished_elsewhere(cell: Cell, run: Any, store: Store, ended: Sequence[str] = RESULTS) -> Finished | None:
    """The run MLflow has of a cell, if it has ended."""
    record = record_of(run) if run else None
    if run is None or record is None or record.status not in ended:
        return None
    elsewhere = run.data.tags.get(FOLDER)
    note = f"MLflow has this run as done in {elsewhere}, which is not here; to train it again delete the run there"
    return Finished(cell, record, run.info.run_id, store.uri, True, () if cell.folder.is_dir() else (note,))


def deliver(cell: Cell, run_id: str, store: Store) -> str:
    """Tells MLflow what it has not heard of a run nobody works on. Returns "" or why something still waits."""
    spool = Spool(cell.folder, run_id)
    if not any(spool.pending()):
        return ""
    try:
        with spool_lock(cell.folder).acquire(timeout=DELIVERY_SECONDS):
            return Courier(spool, store.uri).close(DELIVERY_SECONDS)
    except Timeout:
        return "another process is delivering it"


def close(cell: Cell, store: Store, how: str | Outcome, patience_seconds: float = GONE_SECONDS) -> None:
    """Ends a run whose workers and recorder are gone: with a status, for now, or for good with what it came to.

    Waits for the driver of the run to be gone, too. Raises Timeout if it or the recorder stays. What MLflow does not hear in
    time waits in the spool.
    """
    run_id = _remembered(cell, store)
    if run_id is None or not _is_ours(cell, run_id, store):
        return
    with _trunk_lock(cell, patience_seconds), spool_lock(cell.folder).acquire(timeout=patience_seconds):
        if record_path(cell).exists():
            return
        spool = Spool(cell.folder, run_id)

        def tell(kind: str, *arguments: Any) -> None:
            getattr(spool, kind)(*arguments)

        if isinstance(how, Outcome):
            record = record_of_cell(cell, how)
            tell_result(record, how.evaluation, tell)
            write_record(cell, record)
        else:
            tell("tags", {"lmu.status": how})
        tell("end", how.status if isinstance(how, Outcome) else how)
        spool.copy()
        Courier(spool, store.uri).close(patience_seconds)


def check_resumable(cell: Cell) -> list[str]:
    """The damaged checkpoints that will be passed over. Raises ConfigError if the one to go on from does not fit."""
    path, meta, passed_over = checkpoint.newest_intact(cell.folder)
    if meta is not None and not checkpoint.loadable(meta, cell.config.cluster.zero_stage):
        raise ConfigError(
            f"{path} was written at ZeRO stage {meta.zero_stage}, and DeepSpeed converts only 1 to 2 and back; go on "
            f"with cluster.zero_stage={meta.zero_stage} (in a ladder, by ladder.workers)"
        )
    return passed_over


@contextmanager
def alone(cell: Cell) -> Iterator[None]:
    """Holds the trunk's folder against a second driver. Raises BusyError."""
    try:
        with _trunk_lock(cell, 0):
            yield
    except Timeout as e:
        raise BusyError(f"{cell.name} is being run by another process; wait for it, or change the configuration") from e


def notes(passed_over: list[str], undelivered: str) -> tuple[str, ...]:
    """What a person should know of a run."""
    late = f"MLflow has not all of the record yet, the same command delivers the rest: {undelivered}"
    return (*passed_over, *([late] if undelivered else []))


def open_run(cell: Cell, store: Store, study: str) -> str:
    """The MLflow run of the cell: the one it has, or a new one under its experiment's study.

    A store that is away is no obstacle if the run was opened in it before: the spool waits. Raises BusyError if a driver with
    another storage is at it.
    """
    try:
        run = store.find_run(cell.key)
        if run is not None and _is_alive_elsewhere(cell, run):
            raise PerhapsGoneError(f"{cell.name} is being run in {_place_of(run)}; wait for it")
        if run is not None:
            run_id = run.info.run_id
            if _place_of(run) not in (None, _place(cell)):
                _take_over(cell, run_id, store)
        else:
            experiment_id, study_id = store.open_study(cell.config.experiment, study)
            run_id = store.create_run(experiment_id, study_id, cell.name, cell.key, str(cell.folder), _place(cell))
            # Two drivers may have looked at the same moment. Who sees the other's run takes back his own: at least one does.
            if len(store.runs_of(cell.key)) > 1:
                store.drop_run(run_id)
                raise BusyError(f"{cell.name} was begun by another driver at the same moment; wait for it")
    except BusyError:
        raise
    except ConfigError:
        if (known := _remembered(cell, store)) is not None:
            return known
        raise
    make_folder(cell.folder)
    write_whole(cell.folder / "run.json", json.dumps({"tracking_uri": store.uri, "run_id": run_id}).encode())
    return run_id


def _take_over(cell: Cell, run_id: str, store: Store) -> None:
    """Makes a run that was abandoned in another place ours. Raises BusyError if somebody else does so now."""
    claim = uuid.uuid4().hex
    store.tag(run_id, {CLAIM: claim, FOLDER: str(cell.folder), PLACE: _place(cell), ALIVE: alive_now()})
    time.sleep(CLAIM_SECONDS)
    if store.tag_of(run_id, CLAIM) != claim:
        raise BusyError(f"{cell.name} was taken over by another driver; wait for it")


def _is_alive_elsewhere(cell: Cell, run: Any) -> bool:
    tags = run.data.tags
    heard, ended = float(tags.get(ALIVE, "0")) / 1000, tags.get("lmu.status") in records.ENDED
    return not ended and _place_of(run) not in (None, _place(cell)) and time.time() - heard < SILENCE_SECONDS


def check_not_elsewhere(cell: Cell, run: Any) -> None:
    """Raises BusyError if a driver whose locks are not seen here is at work on the MLflow run of a cell."""
    if _is_alive_elsewhere(cell, run):
        raise BusyError(f"{cell.name} is being run in {_place_of(run)}; wait for it, or stop it there")


def _place(cell: Cell) -> str:
    """What drivers that see each other's locks have in common: a word in a file beside these, made by the first of them."""
    folder = beside(cell.config.storage_folder)
    make_folder(folder)
    word, made = folder / "place", folder / f"place.{uuid.uuid4().hex}"
    if not word.exists():
        made.write_text(f"{platform.node()}:{folder}:{uuid.uuid4().hex[:12]}")
        with suppress(FileExistsError):
            word.hardlink_to(made)  # whole, and only once
        made.unlink()
    return word.read_text()


def _place_of(run: Any) -> str | None:
    return run.data.tags.get(PLACE, run.data.tags.get(FOLDER))


def _is_ours(cell: Cell, run_id: str, store: Store) -> bool:
    """Whether it was this place's drivers that had the run last; taken for granted while the store is away."""
    try:
        return store.tag_of(run_id, PLACE) in (None, "", _place(cell))
    except AwayError:
        return True


def _trunk_lock(cell: Cell, patience_seconds: float) -> FileLock:
    here = beside(cell.trunk_folder)
    make_folder(here)
    return FileLock(here / "lock", timeout=patience_seconds)


def _remembered(cell: Cell, store: Store) -> str | None:
    """The id under which this store knows the run, from an earlier start."""
    try:
        known = json.loads((cell.folder / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return known["run_id"] if known["tracking_uri"] == store.uri else None
