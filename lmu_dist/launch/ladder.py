"""The driver of `lmu-dist ladder`: trains every missing cell of a grid exactly once, in Ray Tune trials. Returns the records.

A trial is a group of workers that takes one trunk after the other from a queue: the cells that share their steps before the
decay. Which cells have ended is read from their folders and from MLflow only, so the same command resumes a ladder after any
failure. Progress goes to callbacks.
"""

import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from filelock import Timeout
from ray import tune
from ray.exceptions import RayError

from lmu_dist import records, storage
from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.data.progress import Progress
from lmu_dist.launch import claim
from lmu_dist.launch.cell import BRANCH_POINTS, Cell
from lmu_dist.launch.cluster import capacity, check_before_start, cluster
from lmu_dist.launch.corpus import prepare_corpus
from lmu_dist.launch.finished import find_all_finished
from lmu_dist.launch.ladder_trial import STUDY, train_work_items
from lmu_dist.launch.locks import exclusive_lock
from lmu_dist.launch.metrics_logger import release_log, start_metrics_logger
from lmu_dist.launch.new_cell import at_half_rate, make_cell
from lmu_dist.launch.record import FinishedRun, record_path
from lmu_dist.launch.trials import (
    Slots,
    TrialCallback,
    driver_environment,
    error_message,
    head_node_id,
    run_trials,
    wait_for_release,
)
from lmu_dist.launch.waves import Waves, plan_of
from lmu_dist.launch.work_queue import WorkItem, WorkState, start_work_queue
from lmu_dist.models import registry
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import grid
from lmu_dist.planning.plan_rows import to_row
from lmu_dist.tracking.ended_rows import keep_rows
from lmu_dist.tracking.errors import MLflowUnavailableError
from lmu_dist.tracking.runs import KnownRuns, find_known_runs, find_run, retire_run
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import write_plan
from lmu_dist.tracking.tags import STATUS
from lmu_dist.tracking.upload import set_client_limits
from lmu_dist.train import VERSION

CLOSING_SECONDS = 30.0  # timeout of an interrupted ladder for closing its MLflow runs
POLL_SECONDS = 5.0  # between two checks whether another driver has finished
STATE_SECONDS = 10.0  # how long the queue may take to say what is running
NO_RECORD = "its trial ended without a record"


@dataclass(frozen=True)
class LadderResult:
    """The result of a ladder: the run of every cell that ended (of its retry, if it diverged), and why the others failed."""

    finished: tuple[FinishedRun, ...]
    failures: dict[str, str]  # error message, one line, by the name of the cell
    notes: tuple[str, ...]
    stopped: str = ""  # why a ladder with `until` stopped, and the intervals at the stop


def ladder(config: Config, tracking_uri: str, progress: Progress = lambda *_: None, rerun: Sequence[str] = ()) -> LadderResult:
    """Trains the missing cells of the grid. Raises ConfigError before anything starts if a cell cannot run.

    With `ladder.until` cells are trained in waves, and only until the intervals that it names are narrow enough.
    `rerun`: keys, or the starts of keys, of cells to train again although they have ended.
    """
    if config.ladder is None:
        raise ConfigError("this configuration has no section ladder; take jobs/quickstart.yaml as an example")
    set_client_limits()
    baseline = _baseline(config)
    store = Store(tracking_uri)
    claim.check_store(store, config)
    n_vocab = vocab_tokens(config)
    planned, _ = grid(config, n_vocab)
    check_before_start([cell.config for cell in planned])
    corpus = prepare_corpus(config, progress)
    corpus.tokenizer()
    if corpus.manifest.vocab_tokens != n_vocab:  # it was not prepared before
        planned, _ = grid(config, corpus.manifest.vocab_tokens)
    cells = list({cell.key: cell for cell in (make_cell(p.config, corpus) for p in planned)}.values())
    cells_to_rerun = [_cell_with_key(cells, key) for key in rerun]
    _write_plan(store, cells, baseline)
    waves = Waves(cells, config) if config.ladder.until is not None else None
    driver = _Driver(cells, store, progress, waves)
    if waves is not None:
        waves.choose([cell.key for cell in cells_to_rerun])
    if not cells_to_rerun and not driver.next_trunks(n_slots=1):
        if waves is not None:
            _write_plan(store, cells, baseline, driver.not_needed())
        claim.end_study(store, config, STUDY, known=driver.runs_for_study())
        return driver.result(())
    try:
        with cluster([cell.config for cell in cells]):
            if waves is not None and not cells_to_rerun:
                waves.choose(())  # the cluster may have more slots than one
            for cell in cells_to_rerun:
                _reset(cell, store)
                driver.forget(cell)
            driver.run(storage.local_state_dir(config.storage_folder) / "tune")
            notes = wait_for_release()
    except BaseException as e:
        driver.close(records.INTERRUPTED, CLOSING_SECONDS)
        claim.end_study(store, config, STUDY, "FAILED" if isinstance(e, FailedError) else "KILLED")
        raise
    _write_plan(store, cells, baseline, driver.not_needed())  # again, if MLflow was unavailable at the start
    claim.end_study(store, config, STUDY, "FAILED" if driver.failures else "FINISHED", driver.runs_for_study())
    return driver.result(notes)


class _Driver:
    """The state of one ladder: which cells are finished, failed or running."""

    def __init__(self, cells: list[Cell], store: Store, progress: Progress, waves: Waves | None = None) -> None:
        self.cells, self.store, self.progress, self.waves = cells, store, progress, waves
        self.finished: dict[str, FinishedRun] = {}  # by key
        self.failures: dict[str, str] = {}
        self.work_items: Sequence[WorkItem] = ()
        self.work = WorkState()  # of these items
        self.queue: Any = None  # the WorkQueue that hands them out
        self.metrics_logger: Any = None  # of all runs
        self.known_runs: KnownRuns | None = None  # those that MLflow had at the last refresh; None: it did not answer
        self.mlflow_runs: dict[str, Any] = {}  # those of the last answer, by key
        self._ended: set[str] = set()  # keys of cells that have ended since the last refresh
        self._asked: tuple[Sequence[WorkItem], Any] | None = None  # work items, and the answer to come of their queue
        self._refresh()
        self.finished_before = frozenset(self.finished)

    def forget(self, cell: Cell) -> None:
        """Marks a cell as missing."""
        self.finished.pop(cell.key, None)
        self._ended.discard(cell.key)
        forgotten = (cell.key, at_half_rate(cell).key)
        self.mlflow_runs = {key: run for key, run in self.mlflow_runs.items() if key not in forgotten}
        self.finished_before -= {cell.key}

    def missing(self) -> list[list[Cell]]:
        """The cells that have neither ended nor failed, grouped by trunk, cheapest trunk first, as in the grid."""
        trunks: dict[str, list[Cell]] = {}
        for cell in self.cells:
            is_chosen = self.waves is None or cell.key in self.waves.chosen
            if is_chosen and cell.key not in self.finished and cell.name not in self.failures:
                trunks.setdefault(cell.trunk, []).append(cell)
        return list(trunks.values())

    def next_trunks(self, n_slots: int) -> list[list[Cell]]:
        """The trunks to train now: those that are missing, or those of the next wave. Empty if the ladder ends."""
        trunks = self.missing()
        if not trunks and self.waves is not None:
            self.waves.advance(self.finished, self.failures, n_slots)
            trunks = self.missing()
        return trunks

    def not_needed(self) -> frozenset[str]:
        """The keys of the cells before which a ladder with `until` stopped."""
        if self.waves is None or not self.waves.message:
            return frozenset()
        return frozenset(c.key for c in self.cells if c.key not in self.finished and c.name not in self.failures)

    def run(self, scratch: Path) -> None:
        """Trains trunks until each cell has ended or failed. Waits for trunks that another driver is training."""
        n_slots = capacity(self.cells[0].config)
        head = head_node_id()
        self.metrics_logger = start_metrics_logger(self.store.uri, head)
        while trunks := self.next_trunks(n_slots):
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
                "config": self.cells[0].config,
                "tracking_uri": self.store.uri,
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
            self.failures |= {cell.name: message for cell in cells if cell.key not in self.finished}

    def _refresh(self) -> None:
        """Reads from MLflow and the cells' folders which cells have ended, by this driver or another."""
        first = self.cells[0].config, self.cells[0].corpus.manifest.data_digest
        self.known_runs = None
        with suppress(MLflowUnavailableError):  # keep the runs of the last refresh, by key
            self.known_runs = find_known_runs(self.store, first[0].experiment, first[1], VERSION)
            self.mlflow_runs = self.known_runs.by_key()
            if self.known_runs.own:
                keep_rows(self.store, first[0].experiment, self.known_runs.own)
        unknown = [cell for cell in self.cells if cell.key not in self.finished]
        self.finished |= find_all_finished(unknown, self.store, STUDY, self.mlflow_runs)
        self._ended = set()

    def runs_for_study(self) -> KnownRuns | None:
        """The runs of the last refresh; None if MLflow did not answer, or got the end of a run only since."""
        ended = (self.mlflow_runs.get(run.cell.key) for run in self.finished.values())
        is_up_to_date = all(run is not None and run.data.tags.get(STATUS) in records.ENDED for run in ended)
        return self.known_runs if is_up_to_date else None

    def note_ended(self, cells: Iterable[Cell]) -> None:
        """Notes for the progress that cells of this ladder have ended, with whatever status."""
        self._ended.update(cell.key for cell in cells if cell.key not in self.finished)

    def report_progress(self, remark: str = "") -> None:
        """Updates the progress bar by what is known of the cells, which costs no file of those that have ended."""
        self._ask_queue()
        ended = len(self.finished) + len(self._ended)
        self.progress("ladder", ended, len(self.cells), f"{ended} of {len(self.cells)} cells ended {remark}".strip())

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
                    claim.close_run(attempt, self.store, STUDY, status, max(1.0, deadline - time.monotonic()), release)

    def result(self, notes: Iterable[str]) -> LadderResult:
        """The result of the ladder, with further notes."""
        finished = ((cell.key, self.finished[cell.key]) for cell in self.cells if cell.key in self.finished)
        runs = tuple(replace(run, already_done=key in self.finished_before) for key, run in finished)
        run_notes = dict.fromkeys(note for run in runs for note in run.notes)
        return LadderResult(runs, self.failures, (*run_notes, *notes), self.waves.message if self.waves is not None else "")


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
        with exclusive_lock(attempt):
            if (run := find_run(store, attempt.key)) is not None:
                claim.check_not_running_elsewhere(attempt, run)
                retire_run(store, run.info.run_id)
            storage.remove(attempt.folder)
            storage.remove(storage.local_state_dir(attempt.folder))
            storage.remove(attempt.trunk_folder / BRANCH_POINTS)


def _baseline(config: Config) -> str:
    """The name of the family in plan.baseline. Raises ConfigError if there is none of this name."""
    try:
        return registry.find(config.plan.baseline).name
    except ConfigError as e:
        raise ConfigError(f"plan.baseline: {e}") from e


def _write_plan(store: Store, cells: Sequence[Cell], baseline: str, not_needed: Collection[str] = ()) -> None:
    with suppress(MLflowUnavailableError, OSError):  # of the disk of temporary files or artifacts
        config = cells[0].config
        rows = [to_row(cell) for cell in plan_of(cells)]
        rows = [row | {"not_needed": row["key"] in not_needed} for row in rows]
        write_plan(store, config.experiment, STUDY, rows, baseline)
