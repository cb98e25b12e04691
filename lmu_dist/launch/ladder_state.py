"""The state of a ladder: which cells are finished or failed, and which to train next, by their folders and by MLflow.

A ladder with nothing left to train needs no more than this, and so neither Ray Tune nor workers. Called by ladder and
ladder_driver.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from lmu_dist import records
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.finished import find_all_finished
from lmu_dist.launch.new_cell import at_half_rate
from lmu_dist.launch.record import FinishedRun
from lmu_dist.launch.waves import Waves
from lmu_dist.tracking.ended_rows import keep_rows
from lmu_dist.tracking.errors import MLflowUnavailableError
from lmu_dist.tracking.runs import KnownRuns, find_known_runs
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.tags import LADDER_STUDY, STATUS
from lmu_dist.train import VERSION


@dataclass(frozen=True)
class LadderResult:
    """The result of a ladder: the run of every cell that ended (of its retry, if it diverged), and why the others failed."""

    finished: tuple[FinishedRun, ...]
    failures: dict[str, str]  # error message, one line, by the name of the cell
    notes: tuple[str, ...]
    stopped: str = ""  # why a ladder with `until` stopped, and the intervals at the stop


class LadderState:
    """Which cells of a ladder are finished or failed. With `waves`, only the cells of a wave are to be trained."""

    def __init__(self, cells: list[Cell], store: Store, waves: Waves | None = None) -> None:
        self.cells, self.store, self.waves = cells, store, waves
        self.finished: dict[str, FinishedRun] = {}  # by key
        self.failures: dict[str, str] = {}  # error message by the name of the cell
        self.known_runs: KnownRuns | None = None  # those that MLflow had at the last refresh; None: it did not answer
        self.mlflow_runs: dict[str, Any] = {}  # those of the last answer, by key
        self.refresh()
        self.finished_before = frozenset(self.finished)

    def refresh(self) -> None:
        """Reads from MLflow and the cells' folders which cells have ended, by this driver or another."""
        first = self.cells[0].config, self.cells[0].corpus.manifest.data_digest
        self.known_runs = None
        with suppress(MLflowUnavailableError):  # keep the runs of the last refresh, by key
            self.known_runs = find_known_runs(self.store, first[0].experiment, first[1], VERSION)
            self.mlflow_runs = self.known_runs.by_key()
            if self.known_runs.own:
                keep_rows(self.store, first[0].experiment, self.known_runs.own)
        unknown = [cell for cell in self.cells if cell.key not in self.finished]
        self.finished |= find_all_finished(unknown, self.store, LADDER_STUDY, self.mlflow_runs)

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

    def runs_for_study(self) -> KnownRuns | None:
        """The runs of the last refresh; None if MLflow did not answer, or got the end of a run only since."""
        ended = (self.mlflow_runs.get(run.cell.key) for run in self.finished.values())
        is_up_to_date = all(run is not None and run.data.tags.get(STATUS) in records.ENDED for run in ended)
        return self.known_runs if is_up_to_date else None

    def result(self, notes: Iterable[str]) -> LadderResult:
        """The result of the ladder, with further notes."""
        finished = ((cell.key, self.finished[cell.key]) for cell in self.cells if cell.key in self.finished)
        runs = tuple(replace(run, already_done=key in self.finished_before) for key, run in finished)
        run_notes = dict.fromkeys(note for run in runs for note in run.notes)
        return LadderResult(runs, self.failures, (*run_notes, *notes), self.waves.message if self.waves is not None else "")
