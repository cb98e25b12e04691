"""The driver of `lmu-dist ladder`: trains every missing cell of a grid exactly once, in Ray Tune trials. Returns the records.

A trial trains one trunk: the cells that share their steps before the decay. Which cells have ended is read from their folders
and from MLflow only, so the same command resumes a ladder after any failure. Progress goes to callbacks.
"""

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import Timeout
from ray import tune

from lmu_dist import records, storage
from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.data.progress import Progress
from lmu_dist.launch import claim
from lmu_dist.launch.cell import BRANCH_POINTS, Cell, at_half_rate, make_cell
from lmu_dist.launch.claim import BusyError, FinishedRun
from lmu_dist.launch.cluster import capacity, check_before_start, cluster
from lmu_dist.launch.corpus import prepare_corpus
from lmu_dist.launch.record import record_path
from lmu_dist.launch.run_group import train_run_group
from lmu_dist.launch.trials import (
    Slots,
    TrialCallback,
    check_state_api,
    driver_environment,
    error_message,
    run_trials,
    wait_for_release,
)
from lmu_dist.models import registry
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import grid
from lmu_dist.tracking.runs import find_run, retire_run, runs_by_key
from lmu_dist.tracking.store import MLflowUnavailableError, Store
from lmu_dist.tracking.studies import write_plan
from lmu_dist.tracking.upload import set_client_limits
from lmu_dist.train import VERSION

STUDY = "ladder"
CLOSING_SECONDS = 30.0  # timeout of an interrupted ladder for closing its MLflow runs
PROGRESS_SECONDS = 60.0  # between two updates of the progress bar where these cost requests to an object store
POLL_SECONDS = 5.0  # between two checks whether another driver has finished


@dataclass(frozen=True)
class LadderResult:
    """The result of a ladder: the run of every cell that ended (of its retry, if it diverged), and why the others failed."""

    finished: tuple[FinishedRun, ...]
    failures: dict[str, str]  # error message, one line, by the name of the cell
    notes: tuple[str, ...]


def ladder(config: Config, tracking_uri: str, progress: Progress = lambda *_: None, rerun: Sequence[str] = ()) -> LadderResult:
    """Trains the missing cells of the grid. Raises ConfigError before anything starts if a cell cannot run.

    `rerun`: keys, or the starts of keys, of cells to train again although they have ended.
    """
    if config.ladder is None:
        raise ConfigError("this configuration has no section ladder; take jobs/quickstart.yaml as an example")
    set_client_limits()
    store = Store(tracking_uri)
    claim.check_store(store, config)
    check_before_start([planned.config for planned in grid(config, vocab_tokens(config))[0]])
    corpus = prepare_corpus(config, progress)
    corpus.tokenizer()
    planned, _ = grid(config, corpus.manifest.vocab_tokens)
    cells = list({cell.key: cell for cell in (make_cell(p.config, corpus) for p in planned)}.values())
    cells_to_rerun = [_cell_with_key(cells, key) for key in rerun]
    _write_plan(store, cells)
    driver = _Driver(cells, store, progress)
    if not cells_to_rerun and not driver.missing():
        claim.end_study(store, config, STUDY)
        return driver.result(())
    try:
        with cluster([cell.config for cell in cells]):
            check_state_api()
            for cell in cells_to_rerun:
                _reset(cell, store)
                driver.forget(cell)
            driver.run(storage.local_state_dir(config.storage_folder) / "tune")
            notes = wait_for_release()
    except BaseException as e:
        driver.close(records.INTERRUPTED, CLOSING_SECONDS)
        claim.end_study(store, config, STUDY, "FAILED" if isinstance(e, FailedError) else "KILLED")
        raise
    _write_plan(store, cells)  # again, if MLflow was unavailable at the start
    claim.end_study(store, config, STUDY, "FAILED" if driver.failures else "FINISHED")
    return driver.result(notes)


class _Driver:
    """The state of one ladder: which cells are finished, failed or running."""

    def __init__(self, cells: list[Cell], store: Store, progress: Progress) -> None:
        self.cells, self.store, self.progress = cells, store, progress
        self.finished: dict[str, FinishedRun] = {}  # by key
        self.failures: dict[str, str] = {}
        self.work_items: list[tuple[Cell, ...]] = []
        self.running: set[int] = set()  # indices of work items whose trial has started and not ended; a trial that died stays
        self.mlflow_runs: dict[str, Any] = {}  # by key
        self._last_progress = -PROGRESS_SECONDS
        self._refresh()
        self.finished_before = frozenset(self.finished)

    def forget(self, cell: Cell) -> None:
        """Marks a cell as missing."""
        self.finished.pop(cell.key, None)
        forgotten = (cell.key, at_half_rate(cell).key)
        self.mlflow_runs = {key: run for key, run in self.mlflow_runs.items() if key not in forgotten}
        self.finished_before -= {cell.key}

    def missing(self) -> list[list[Cell]]:
        """The cells that have neither ended nor failed, grouped by trunk, cheapest trunk first, as in the grid."""
        trunks: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.key not in self.finished and cell.name not in self.failures:
                trunks.setdefault(cell.trunk, []).append(cell)
        return list(trunks.values())

    def run(self, scratch: Path) -> None:
        """Trains trunks until each cell has ended or failed. Waits for trunks that another driver is training."""
        n_slots = capacity(self.cells[0].config)
        while trunks := self.missing():
            self.work_items, self.running = [tuple(trunk) for trunk in trunks], set()
            # A run with cluster.min_workers may get fewer workers than n_workers.
            sizes = [min(n_slots, work_item[0].config.cluster.n_workers) for work_item in self.work_items]
            results = run_trials(
                _run_trunk,
                {"work_items": self.work_items, "tracking_uri": self.store.uri, "environment": driver_environment()},
                scratch,
                tune.TuneConfig(search_alg=Slots(sizes, n_slots), num_samples=len(sizes), reuse_actors=True),
                callbacks=[TrialCallback(self._trial_started, self._trial_ended, self.report_progress)],
            )
            self.close(records.FAILED, CLOSING_SECONDS)
            self._refresh()
            busy = False
            for result in results:
                if (result.metrics or {}).get("busy"):
                    busy = True
                    continue
                assert result.config is not None
                message = error_message(result) or "its trial ended without a record"
                work_item = self.work_items[result.config["index"]]
                self.failures |= {cell.name: message for cell in work_item if cell.key not in self.finished}
            if busy:
                self.report_progress("waiting for another driver, or for MLflow")
                time.sleep(POLL_SECONDS)
                self._refresh()

    def _refresh(self) -> None:
        """Reads from MLflow and the cells' folders which cells have ended, by this driver or another."""
        first = self.cells[0]
        with suppress(MLflowUnavailableError):  # keep the runs of the last refresh
            self.mlflow_runs = runs_by_key(self.store, first.corpus.manifest.data_digest, VERSION)
        for cell in self.cells:
            if cell.key not in self.finished and (run := self._finished_run(cell)) is not None:
                self.finished[cell.key] = run

    def _finished_run(self, cell: Cell) -> FinishedRun | None:
        """The finished run of a cell; of its retry, if the cell diverged."""
        run = self._finished_attempt(cell)
        if run is None or run.record.status != records.DIVERGED:
            return run
        return self._finished_attempt(at_half_rate(cell))

    def _finished_attempt(self, cell: Cell) -> FinishedRun | None:
        mlflow_run = self.mlflow_runs.get(cell.key)
        if record_path(cell).exists():
            return claim.find_finished(cell, self.store, STUDY, mlflow_run)
        return claim.finished_in_mlflow(cell, mlflow_run, self.store)

    def report_progress(self, remark: str = "") -> None:
        """Updates the progress bar; less often for a storage at a URI, where it costs a request per cell."""
        interval = PROGRESS_SECONDS if storage.is_remote(self.cells[0].folder) else 0
        if not remark and time.monotonic() - self._last_progress < interval:
            return
        self._last_progress = time.monotonic()
        ended = sum(1 for cell in self.cells if cell.key in self.finished or record_path(cell).exists())
        self.progress("ladder", ended, len(self.cells), f"{ended} of {len(self.cells)} cells ended {remark}".strip())

    def close(self, status: str, timeout_seconds: float) -> None:
        """Closes the MLflow runs of trials that died or were interrupted, because their workers cannot."""
        deadline = time.monotonic() + timeout_seconds
        for cell in (cell for index in self.running for cell in self.work_items[index]):
            for attempt in (cell, at_half_rate(cell)):
                with suppress(ConfigError, FailedError, Timeout, OSError):
                    claim.close_run(attempt, self.store, STUDY, status, max(1.0, deadline - time.monotonic()))

    def _trial_started(self, trial: Any) -> None:
        self.running.add(trial.config["index"])

    def _trial_ended(self, trial: Any, died: bool) -> None:
        if not died:  # the runs of a trial that died are still open; `close` closes them
            self.running.discard(trial.config["index"])

    def result(self, notes: Iterable[str]) -> LadderResult:
        """The result of the ladder, with further notes."""
        finished = ((cell.key, self.finished[cell.key]) for cell in self.cells if cell.key in self.finished)
        runs = tuple(replace(run, already_done=key in self.finished_before) for key, run in finished)
        run_notes = dict.fromkeys(note for run in runs for note in run.notes)
        return LadderResult(runs, self.failures, (*run_notes, *notes))


def _run_trunk(
    params: dict[str, Any], work_items: list[tuple[Cell, ...]], tracking_uri: str, environment: dict[str, str]
) -> dict[str, Any]:
    """The function of a trial: trains the cells of one trunk, then retries those that diverged at half the learning rate."""
    os.environ.update(environment)
    set_client_limits()
    cells = work_items[params["index"]]
    try:
        if (source := cells[0].family_source) is not None:
            registry.register(source)
        store = Store(tracking_uri)
        finished = train_run_group(cells, store, STUDY)
        diverged = [at_half_rate(f.cell) for f in finished if f.record.status == records.DIVERGED]
        if diverged:
            train_run_group(diverged, store, STUDY)
    except (BusyError, MLflowUnavailableError):
        return {"busy": True}
    except (ConfigError, FailedError, OSError) as e:
        return {"error": storage.error_text(e)}
    return {"busy": False}


def _cell_with_key(cells: list[Cell], key: str) -> Cell:
    """The cell whose key, or whose retry's key, starts with `key`. Raises ConfigError unless there is exactly one."""
    found = [cell for cell in cells if cell.key.startswith(key) or at_half_rate(cell).key.startswith(key)]
    if len(found) != 1:
        raise ConfigError(
            f"--rerun {key}: {len(found) or 'no'} cells of this ladder have a key that starts with this; see lmu-dist status"
        )
    return found[0]


def _reset(cell: Cell, store: Store) -> None:
    """Deletes the folders of a cell and its retry. MLflow keeps their runs, without the tag of a cell."""
    for attempt in (cell, at_half_rate(cell)):
        if not attempt.folder.exists() and find_run(store, attempt.key) is None:
            continue
        with claim.exclusive_lock(attempt):
            if (run := find_run(store, attempt.key)) is not None:
                claim.check_not_running_elsewhere(attempt, run)
                retire_run(store, run.info.run_id)
            storage.remove(attempt.folder)
            storage.remove(storage.local_state_dir(attempt.folder))
            storage.remove(attempt.trunk_folder / BRANCH_POINTS)


def _write_plan(store: Store, cells: Sequence[Cell]) -> None:
    with suppress(MLflowUnavailableError, OSError):  # of the disk of temporary files or artifacts
        write_plan(store, cells[0].config.experiment, STUDY, [_plan_row(cell) for cell in cells])


def _plan_row(cell: Cell) -> dict[str, Any]:
    train = cell.config.train
    tokens, n_workers = train.n_steps * train.batch_tokens, cell.config.cluster.n_workers
    return {"name": cell.name, "key": cell.key, "planned_tokens": tokens, "n_workers": n_workers}
