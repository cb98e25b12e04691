"""Which cells of a ladder have ended: cells and the runs that MLflow has in, FinishedRuns out. Called by ladder.

A cell has ended if record.json is in its folder or MLflow has a finished run with its key. If MLflow has the end of a complete
run, no file of it is read, since the end is the last entry of a log that is uploaded. Which folders exist is listed once for
each trunk. So a finished cell costs no request and no file of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lmu_dist import records
from lmu_dist.config import Folder
from lmu_dist.launch import claim
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.locks import owner_id
from lmu_dist.launch.new_cell import at_half_rate
from lmu_dist.launch.record import FinishedRun, record_path
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.tags import STATUS


def find_all_finished(cells: Sequence[Cell], store: Store, study: str, runs: Mapping[str, Any]) -> dict[str, FinishedRun]:
    """The finished runs of those cells of a ladder that have ended, by key; of the retry of a cell that diverged.

    `runs`: the runs that MLflow has, by key. Entries of a log that MLflow lacks are uploaded, as `claim.find_finished` does.
    """
    if not cells:
        return {}
    folders, own_id = _Folders(cells[0].config.storage_folder), owner_id(cells[0])

    def attempt(cell: Cell) -> FinishedRun | None:
        run, is_here = runs.get(cell.key), folders.has(cell)
        if run is not None and _is_complete(run) and claim.is_run_of(cell, run, own_id):
            return claim.finished_in_mlflow(cell, run, store, is_here=is_here)
        if is_here and record_path(cell).exists():
            return claim.find_finished(cell, store, study, run)
        return claim.finished_in_mlflow(cell, run, store, is_here=is_here)

    found = dict[str, FinishedRun]()
    for cell in cells:
        ended = attempt(cell)
        if ended is not None and ended.record.status == records.DIVERGED:
            ended = attempt(at_half_rate(cell))
        if ended is not None:
            found[cell.key] = ended
    return found


def _is_complete(run: Any) -> bool:
    """Whether MLflow has every entry of a run that reached its end."""
    return run.info.status == "FINISHED" and run.data.tags.get(STATUS) == records.COMPLETE


class _Folders:
    """The folders that a storage has, listed when they are asked for: one listing, and one for each trunk."""

    def __init__(self, storage_folder: Folder) -> None:
        self._root = storage_folder
        self._names = dict[str, frozenset[str]]()  # by folder

    def has(self, cell: Cell) -> bool:
        """Whether the folder of a cell exists."""
        trunk = cell.trunk_folder
        return trunk.name in self._list(self._root) and cell.folder.name in self._list(trunk)

    def _list(self, folder: Folder) -> frozenset[str]:
        name = str(folder)
        if name not in self._names:
            try:
                self._names[name] = frozenset(path.name for path in folder.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                self._names[name] = frozenset()
        return self._names[name]
