"""The driver of a grid: runs every missing cell exactly once as Ray Tune trials. A Config with a ladder in, its records out.

A trial takes one trunk: the cells that share their stable steps. What is done is known from the cells' folders and MLflow
alone, so the same command goes on after anything. Called by the command line; progress goes to listeners.
"""

import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import Timeout
from ray import tune

from lmu_dist import records
from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.data.prepare import Progress, prepare
from lmu_dist.launch import claim
from lmu_dist.launch.cell import FORKS, Cell, at_half_rate, make_cell
from lmu_dist.launch.claim import BusyError, Finished
from lmu_dist.launch.cluster import check_before, cluster, room
from lmu_dist.launch.record import record_path
from lmu_dist.launch.series import run_series
from lmu_dist.launch.trials import Slots, check_state_api, run_trials, still_reserved
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import grid
from lmu_dist.tracking.delivery import set_client_limits
from lmu_dist.tracking.store import Store

STUDY = "ladder"
TELL_SECONDS = 2.0  # between two looks at how far the cells are
PAUSE_SECONDS = 5.0  # between two looks at what another driver is doing


@dataclass(frozen=True)
class Climbed:
    """The end of a ladder: a row for every cell that ended (its second try, if it diverged), and why others did not."""

    finished: tuple[Finished, ...]
    failures: dict[str, str]  # name of a cell: one line
    notes: tuple[str, ...]


def ladder(config: Config, tracking_uri: str, progress: Progress = lambda *_: None, rerun: Sequence[str] = ()) -> Climbed:
    """Runs what is missing of the grid. Raises ConfigError before anything is started if a cell could never run.

    `rerun`: keys, or their beginnings, of cells to run again though they have ended.
    """
    if config.ladder is None:
        raise ConfigError("this configuration has no section ladder; take jobs/quickstart.yaml as an example")
    set_client_limits()
    store = Store(tracking_uri)
    store.check()
    check_before([planned.config for planned in grid(config, vocab_tokens(config))[0]])
    corpus = prepare(config.data, config.storage_folder, progress)
    corpus.tokenizer()
    planned, _ = grid(config, corpus.manifest.vocab_tokens)
    cells = list({cell.key: cell for cell in (make_cell(p.config, corpus) for p in planned)}.values())
    for key in rerun:
        _retire(_named(cells, key), store)
    store.write_plan(config.experiment, STUDY, [_plan_row(cell) for cell in cells])
    climb = _Climb(cells, store, progress)
    if not climb.missing():
        return climb.end(())
    try:
        with cluster([cell.config for cell in cells]):
            check_state_api()
            climb.run(config.storage_folder / "tune")
            held = still_reserved()
    except BaseException:
        climb.close(records.INTERRUPTED)
        raise
    return climb.end((f"Ray still holds {len(held)} placement groups of trials that ended: {', '.join(held)}",) if held else ())


class _Climb:
    """The state of one ladder while its driver lives."""

    def __init__(self, cells: list[Cell], store: Store, progress: Progress) -> None:
        self.cells, self.store, self.progress = cells, store, progress
        self.done: dict[str, Finished] = {}
        self.failures: dict[str, str] = {}
        self.works: list[tuple[Cell, ...]] = []
        self.running: set[int] = set()  # trials, by the index of their work
        self._look()
        self.before = frozenset(self.done)

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
            self.works = [tuple(trunk) for trunk in trunks]
            sizes = [work[0].config.cluster.n_workers for work in self.works]
            results = run_trials(
                _climb_trunk,
                {"works": self.works, "tracking_uri": self.store.uri},
                scratch,
                tune.TuneConfig(search_alg=Slots(sizes, n_slots), num_samples=len(sizes), reuse_actors=True),
                callbacks=[_Told(self)],
            )
            self._look()
            busy = False
            for result in results:
                said = result.metrics or {}
                if said.get("busy"):
                    busy = True
                    continue
                reason = str(said.get("error") or result.error or "its trial ended without a record")
                work = self.works[(result.config or {}).get("index", 0)]
                self.failures |= {cell.name: reason for cell in work if cell.key not in self.done}
            if busy:
                self.tell("waiting for another driver")
                time.sleep(PAUSE_SECONDS)
                self._look()

    def _look(self) -> None:
        """Takes note of what has ended, here or elsewhere."""
        first = self.cells[0]
        self.known = self.store.runs_by_key(first.corpus.manifest.data_digest, first.code_digest)
        for cell in self.cells:
            if cell.key not in self.done and (found := self._ended(cell)) is not None:
                self.done[cell.key] = found

    def _ended(self, cell: Cell) -> Finished | None:
        found = self._ended_once(cell)
        if found is None or found.record.status != records.DIVERGED or cell.retry_of:
            return found
        return self._ended_once(at_half_rate(cell))

    def _ended_once(self, cell: Cell) -> Finished | None:
        known = self.known.get(cell.key)
        if record_path(cell).exists():
            return claim.find_done(cell, self.store, STUDY, known)
        return claim.finished_elsewhere(cell, known, self.store)

    def tell(self, remark: str = "") -> None:
        """Brings the progress up to date."""
        ended = sum(1 for cell in self.cells if cell.key in self.done or record_path(cell).exists())
        self.progress("ladder", ended, len(self.cells), f"{ended} of {len(self.cells)} cells ended {remark}".strip())

    def close(self, status: str) -> None:
        """Says in MLflow that what this driver was running is over for now, since its workers could not."""
        for index in self.running:
            for cell in self.works[index]:
                for tried in (cell, at_half_rate(cell)):
                    if tried.folder.exists():
                        with suppress(ConfigError, Timeout, OSError):
                            claim.close(tried, self.store, status)

    def end(self, notes: Iterable[str]) -> Climbed:
        """The summary."""
        done = ((cell.key, self.done[cell.key]) for cell in self.cells if cell.key in self.done)
        ended = tuple(replace(finished, already_done=key in self.before) for key, finished in done)
        said = dict.fromkeys(note for finished in ended for note in finished.notes)
        return Climbed(ended, self.failures, (*said, *notes))


class _Told(tune.Callback):
    """Tune says what happens to trials."""

    def __init__(self, climb: _Climb) -> None:
        self._climb, self._told = climb, 0.0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        self._climb.running.add(trial.config["index"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended."""
        self._climb.running.discard(trial.config["index"])

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Some times a second."""
        if time.monotonic() - self._told > TELL_SECONDS:
            self._climb.tell()
            self._told = time.monotonic()

    def __reduce__(self) -> Any:
        """Tune pickles its callbacks into a snapshot that nobody reads."""
        return tune.Callback, ()


def _climb_trunk(params: dict[str, Any], works: list[tuple[Cell, ...]], tracking_uri: str) -> dict[str, Any]:
    """A trial: runs the cells of one trunk, and those that diverged once more at half the learning rate."""
    set_client_limits()
    store, cells = Store(tracking_uri), works[params["index"]]
    try:
        finished = run_series(cells, store, STUDY)
        wild = [at_half_rate(f.cell) for f in finished if f.record.status == records.DIVERGED and not f.cell.retry_of]
        if wild:
            run_series(wild, store, STUDY)
    except BusyError:
        return {"busy": True}
    except (ConfigError, FailedError, OSError) as e:
        return {"error": str(e)}
    return {"busy": False}


def _named(cells: list[Cell], key: str) -> Cell:
    found = [cell for cell in cells if cell.key.startswith(key)]
    if len(found) != 1:
        raise ConfigError(
            f"--rerun {key}: {len(found) or 'no'} cells of this ladder have a key that begins so; lmu-dist status names them"
        )
    return found[0]


def _retire(cell: Cell, store: Store) -> None:
    """Makes a cell, its second try too, as if it had never run; MLflow keeps its old run under another tag."""
    for tried in (cell, at_half_rate(cell)):
        if (run := store.find_run(tried.key)) is not None:
            store.retire_run(run.info.run_id)
        with claim.alone(tried):
            shutil.rmtree(tried.folder, ignore_errors=True)
            shutil.rmtree(tried.trunk_folder / FORKS, ignore_errors=True)


def _plan_row(cell: Cell) -> dict[str, Any]:
    train = cell.config.train
    tokens, n_workers = train.n_steps * train.batch_tokens, cell.config.cluster.n_workers
    return {"name": cell.name, "key": cell.key, "planned_tokens": tokens, "n_workers": n_workers}
