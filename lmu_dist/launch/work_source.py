"""Where a group of workers gets its work, and what it reports. Implemented by ladder_trial; used by the dispatcher."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lmu_dist.launch.cell import Cell
from lmu_dist.launch.record import FinishedRun


@runtime_checkable
class WorkSource(Protocol):
    """Where a group of workers gets its work, and what it reports. Called from several threads."""

    def next(self) -> Sequence[Cell] | None:
        """The cells of the next trunk, fewest tokens first; None if there is none."""
        ...

    def retry(self, finished: Sequence[FinishedRun]) -> Sequence[Cell]:
        """The cells to train at once because of how these cells of a trunk ended; usually none."""
        ...

    def ended(self, finished: Sequence[FinishedRun]) -> None:
        """The cells of a trunk have ended, and MLflow has their metrics or cannot be reached."""

    def failed(self, cells: Sequence[Cell], error: BaseException) -> None:
        """The cells of a trunk could not be trained."""

    def put_back(self, cells: Sequence[Cell]) -> None:
        """The cells of a trunk were not tried: another group of workers may have them."""


class OneTrunk:
    """A WorkSource of one trunk, whose result the caller asks for."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells: Sequence[Cell] | None = cells
        self._finished: Sequence[FinishedRun] = ()
        self._error: BaseException | None = None

    def next(self) -> Sequence[Cell] | None:
        """The cells, once."""
        cells, self._cells = self._cells, None
        return cells

    def retry(self, finished: Sequence[FinishedRun]) -> Sequence[Cell]:
        """None: the caller sees how they ended."""
        return ()

    def ended(self, finished: Sequence[FinishedRun]) -> None:
        """Keeps the result."""
        self._finished = finished

    def failed(self, cells: Sequence[Cell], error: BaseException) -> None:
        """Keeps the error."""
        self._error = error

    def put_back(self, cells: Sequence[Cell]) -> None:
        """Nothing is claimed ahead of one trunk."""

    def result(self) -> Sequence[FinishedRun]:
        """The finished runs of the cells. Raises the error with which they failed."""
        if self._error is not None:
            raise self._error
        return self._finished
