"""The driver of a grid: runs every missing cell exactly once as Ray Tune trials. A Config with a ladder in, its records out.

A trial takes one trunk: the cells that share their stable steps. What is done is known from the cells' folders and MLflow
alone, so the same command goes on after anything. Called by the command line; progress goes to listeners.
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
from lmu_dist.data.prepare import Progress
from lmu_dist.launch import claim
from lmu_dist.launch.cell import FORKS, Cell, at_half_rate, make_cell
from lmu_dist.launch.claim import BusyError, Finished
from lmu_dist.launch.cluster import check_before, cluster, room
from lmu_dist.launch.corpus import prepared
from lmu_dist.launch.record import record_path
from lmu_dist.launch.series import run_series
from lmu_dist.launch.trials import Slots, Watcher, check_state_api, driver_environment, run_trials, still_reserved, why
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import grid
from lmu_dist.tracking.delivery import set_client_limits
from lmu_dist.tracking.store import AwayError, Store

STUDY = "ladder"
CLOSING_SECONDS = 30.0  # what an interrupted ladder takes to say so in MLflow
LOOK_SECONDS = 60.0  # between two looks at a storage at a URI for the sake of a progress bar
PAUSE_SECONDS = 5.0  # between two looks at what another driver is doing


@dataclass(frozen=True)
class LadderResult:
    """The end of a ladder: a row for every cell that ended (its second try, if it diverged), and why others did not."""

    finished: tuple[Finished, ...]
    failures: dict[str, str]  # name of a cell: one line
    notes: tuple[str, ...]


def ladder(config: Config, tracking_uri: str, progress: Progress = lambda *_: None, rerun: Sequence[str] = ()) -> LadderResult:
    """Runs what is missing of the grid. Raises ConfigError before anything is started if a cell could never run.

    `rerun`: keys, or their beginnings, of cells to run again though they have ended.
    """
    if config.ladder is None:
        raise ConfigError("this configuration has no section ladder; take jobs/quickstart.yaml as an example")
    set_client_limits()
    store = Store(tracking_uri)
    store.check()
    check_before([planned.config for planned in grid(config, vocab_tokens(config))[0]])
    corpus = prepared(config, progress)
    corpus.tokenizer()
    planned, _ = grid(config, corpus.manifest.vocab_tokens)
    cells = list({cell.key: cell for cell in (make_cell(p.config, corpus) for p in planned)}.values())
    again = [_named(cells, key) for key in rerun]
    store.write_plan(config.experiment, STUDY, [_plan_row(cell) for cell in cells])
    driver = _Driver(cells, store, progress)
    if not again and not driver.missing():
        return driver.end(())
    try:
        with cluster([cell.config for cell in cells]):
            check_state_api()
            for cell in again:
                _retire(cell, store)
                driver.forget(cell)
            driver.run(storage.beside(config.storage_folder) / "tune")
            notes = still_reserved()
    except BaseException:
        driver.close(records.INTERRUPTED, CLOSING_SECONDS)
        raise
    return driver.end(notes)


class _Driver:
    """The state of one ladder while its driver lives."""

    def __init__(self, cells: list[Cell], store: Store, progress: Progress) -> None:
        self.cells, self.store, self.progress = cells, store, progress
        self.done: dict[str, Finished] = {}
        self.failures: dict[str, str] = {}
        self.works: list[tuple[Cell, ...]] = []
        self.running: set[int] = set()  # trials, by the index of their work; those whose process died stay
        self.known: dict[str, Any] = {}
        self._told = -LOOK_SECONDS
        self._look()
        self.before = frozenset(self.done)

    def forget(self, cell: Cell) -> None:
        """Takes a cell as not yet run."""
        self.done.pop(cell.key, None)
        self.known = {key: run for key, run in self.known.items() if key not in (cell.key, at_half_rate(cell).key)}
        self.before -= {cell.key}

    def missing(self) -> list[list[Cell]]:
        """Trunks with a cell that has neither ended nor failed; cheapest first, as the cells came."""
        trunks: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.key not in self.done and cell.name not in self.failures:
                trunks.setdefault(cell.trunk, []).append(cell)
        return list(trunks.values())

    def run(self, scratch: Path) -> None:
        """Runs trunks until each has ended or failed; those of another driver are waited for."""
        n_slots = room(self.cells[0].config)
        while trunks := self.missing():
            self.works, self.running = [tuple(trunk) for trunk in trunks], set()
            # A run that can do with fewer workers takes what there is.
            sizes = [min(n_slots, work[0].config.cluster.n_workers) for work in self.works]
            results = run_trials(
                _run_trunk,
                {"works": self.works, "tracking_uri": self.store.uri, "environment": driver_environment()},
                scratch,
                tune.TuneConfig(search_alg=Slots(sizes, n_slots), num_samples=len(sizes), reuse_actors=True),
                callbacks=[Watcher(self._begun, self._ended_trial, self.tell)],
            )
            self.close(records.FAILED, CLOSING_SECONDS)
            self._look()
            busy = False
            for result in results:
                if (result.metrics or {}).get("busy"):
                    busy = True
                    continue
                assert result.config is not None
                work, reason = self.works[result.config["index"]], why(result) or "its trial ended without a record"
                self.failures |= {cell.name: reason for cell in work if cell.key not in self.done}
            if busy:
                self.tell("waiting for another driver, or for MLflow")
                time.sleep(PAUSE_SECONDS)
                self._look()

    def _look(self) -> None:
        """Takes note of what has ended, here or elsewhere."""
        first = self.cells[0]
        with suppress(AwayError):  # it may be back at the next look; what was known stays known
            self.known = self.store.runs_by_key(first.corpus.manifest.data_digest, first.code_digest)
        for cell in self.cells:
            if cell.key not in self.done and (found := self._ended(cell)) is not None:
                self.done[cell.key] = found

    def _ended(self, cell: Cell) -> Finished | None:
        found = self._ended_once(cell)
        if found is None or found.record.status != records.DIVERGED:
            return found
        return self._ended_once(at_half_rate(cell))

    def _ended_once(self, cell: Cell) -> Finished | None:
        known = self.known.get(cell.key)
        if record_path(cell).exists():
            return claim.find_done(cell, self.store, STUDY, known)
        return claim.finished_elsewhere(cell, known, self.store)

    def tell(self, remark: str = "") -> None:
        """Brings the progress up to date; seldom where it takes a request for every cell."""
        if not remark and time.monotonic() - self._told < (LOOK_SECONDS if storage.is_remote(self.cells[0].folder) else 0):
            return
        self._told = time.monotonic()
        ended = sum(1 for cell in self.cells if cell.key in self.done or record_path(cell).exists())
        self.progress("ladder", ended, len(self.cells), f"{ended} of {len(self.cells)} cells ended {remark}".strip())

    def close(self, status: str, patience_seconds: float) -> None:
        """Says in MLflow that what this driver was running is over for now, since its workers could not."""
        deadline = time.monotonic() + patience_seconds
        for cell in (cell for index in self.running for cell in self.works[index]):
            for tried in (cell, at_half_rate(cell)):
                with suppress(ConfigError, Timeout, OSError):
                    claim.close(tried, self.store, status, max(1.0, deadline - time.monotonic()))

    def _begun(self, trial: Any) -> None:
        self.running.add(trial.config["index"])

    def _ended_trial(self, trial: Any, died: bool) -> None:
        if not died:  # else nobody has closed its runs, and this driver does at its end
            self.running.discard(trial.config["index"])

    def end(self, notes: Iterable[str]) -> LadderResult:
        """The summary."""
        done = ((cell.key, self.done[cell.key]) for cell in self.cells if cell.key in self.done)
        ended = tuple(replace(finished, already_done=key in self.before) for key, finished in done)
        said = dict.fromkeys(note for finished in ended for note in finished.notes)
        return LadderResult(ended, self.failures, (*said, *notes))


def _run_trunk(
    params: dict[str, Any], works: list[tuple[Cell, ...]], tracking_uri: str, environment: dict[str, str]
) -> dict[str, Any]:
    """A trial: runs the cells of one trunk, and those that diverged once more at half the learning rate."""
    os.environ.update(environment)
    set_client_limits()
    cells = works[params["index"]]
    try:
        store = Store(tracking_uri)
        finished = run_series(cells, store, STUDY)
        wild = [at_half_rate(f.cell) for f in finished if f.record.status == records.DIVERGED]
        if wild:
            run_series(wild, store, STUDY)
    except (BusyError, AwayError):
        return {"busy": True}
    except (ConfigError, FailedError, OSError) as e:
        return {"error": str(e)}
    return {"busy": False}


def _named(cells: list[Cell], key: str) -> Cell:
    found = [cell for cell in cells if cell.key.startswith(key) or at_half_rate(cell).key.startswith(key)]
    if len(found) != 1:
        raise ConfigError(
            f"--rerun {key}: {len(found) or 'no'} cells of this ladder have a key that begins so; lmu-dist status names them"
        )
    return found[0]


def _retire(cell: Cell, store: Store) -> None:
    """Makes a cell, its second try too, as if it had never run; MLflow keeps its old run under another tag."""
    for tried in (cell, at_half_rate(cell)):
        if not tried.folder.exists() and store.find_run(tried.key) is None:
            continue
        with claim.alone(tried):
            if (run := store.find_run(tried.key)) is not None:
                claim.check_not_elsewhere(tried, run)
                store.retire_run(run.info.run_id)
            storage.remove(tried.folder)
            storage.remove(storage.beside(tried.folder))
            storage.remove(tried.trunk_folder / FORKS)


def _plan_row(cell: Cell) -> dict[str, Any]:
    train = cell.config.train
    tokens, n_workers = train.n_steps * train.batch_tokens, cell.config.cluster.n_workers
    return {"name": cell.name, "key": cell.key, "planned_tokens": tokens, "n_workers": n_workers}
