"""The dispatcher of a group of workers, with run groups and actors that are imitated: no trunk is lost, whatever fails."""

from collections.abc import Sequence
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest

from lmu_dist import records
from lmu_dist.config import FailedError
from lmu_dist.launch import dispatcher as module
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.dispatcher import Dispatcher, Services
from lmu_dist.launch.record import FinishedRun
from lmu_dist.launch.run_group import ClaimedRunGroup
from lmu_dist.launch.workers import CannotStartError
from lmu_dist.tracking.run_identity import LoggedRun

MAX_FAILURES = 2


def a_cell(name: str) -> Cell:
    cell = MagicMock(spec=Cell, config=MagicMock())
    cell.name, cell.config.cluster.max_failures = name, MAX_FAILURES
    return cell


class Group(ClaimedRunGroup):
    """Imitates a ClaimedRunGroup: a trunk of one cell."""

    has_ended = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    claimed: ClassVar[list[str]] = []
    ended_before: ClassVar[set[str]] = set()
    broken: ClassVar[set[str]] = set()

    def __init__(self, cells: Sequence[Cell], *_: Any) -> None:
        [cell] = cells
        if cell.name in self.broken:
            raise RuntimeError("an error of the client of an object store")
        self.claimed.append(cell.name)
        self.all_cells, self.runs = (cell,), ()
        self.has_ended = cell.name in self.ended_before  # pyright: ignore[reportAttributeAccessIssue, reportIncompatibleMethodOverride]
        self.cells = () if self.has_ended else (cell,)

    def finished(self) -> list[FinishedRun]:
        return [MagicMock(spec=FinishedRun, cell=self.all_cells[0])] if self.has_ended else []

    def close(self, status: str) -> list[FinishedRun]:
        return self.finished()


class Source:
    """A WorkSource of some trunks, which notes what happens to each."""

    def __init__(self, *trunks: str, diverged: str = "") -> None:
        self.trunks, self.diverged = list(trunks), diverged
        self.events = list[tuple[str, str]]()

    def next(self) -> Sequence[Cell] | None:
        return [a_cell(self.trunks.pop(0))] if self.trunks else None

    def retry(self, finished: Sequence[FinishedRun]) -> Sequence[Cell]:
        return [a_cell("retry")] if finished[0].cell.name == self.diverged else ()

    def ended(self, finished: Sequence[FinishedRun]) -> None:
        self.events.append(("ended", finished[0].cell.name))

    def failed(self, cells: Sequence[Cell], error: BaseException) -> None:
        self.events.append((f"failed: {error}", cells[0].name))

    def put_back(self, cells: Sequence[Cell]) -> None:
        self.events.append(("put back", cells[0].name))
        self.trunks.insert(0, cells[0].name)


@pytest.fixture(autouse=True)
def _imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ClaimedRunGroup", Group)
    monkeypatch.setattr(Group, "claimed", [])
    monkeypatch.setattr(Group, "ended_before", set())
    monkeypatch.setattr(Group, "broken", set())


def dispatcher_of(source: Source) -> Dispatcher:
    return Dispatcher(source, "group", Services("sqlite:///store", "ladder", MagicMock(), MagicMock()), False, ())


def current(dispatcher: Dispatcher) -> Any:
    return dispatcher._current  # pyright: ignore[reportPrivateUsage]


def test_workers_that_start_again_get_the_run_group_that_has_not_ended():
    source = Source("a", "b")
    dispatcher = dispatcher_of(source)
    assert dispatcher.has_work()
    assert dispatcher.has_work()
    assert Group.claimed == ["a"]
    current(dispatcher).has_ended = True
    assert dispatcher.has_work()
    assert Group.claimed == ["a", "b"]
    current(dispatcher).has_ended = True
    assert not dispatcher.has_work()
    dispatcher.close(records.INTERRUPTED)
    assert sorted(source.events) == [("ended", "a"), ("ended", "b")]


def test_retry_of_a_cell_that_diverged_before_an_interruption_is_trained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Group, "ended_before", {"a"})
    dispatcher = dispatcher_of(Source("a", diverged="a"))
    assert dispatcher.has_work()
    assert Group.claimed == ["a", "retry"]


def test_workers_are_not_started_for_cells_that_ended_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Group, "ended_before", {"a", "b"})
    assert not dispatcher_of(Source("a", "b")).has_work()


def test_failures_are_counted_for_each_run_group():
    source = Source("a", "b")
    dispatcher = dispatcher_of(source)
    for trunk in ("a", "b"):
        for _ in range(MAX_FAILURES + 1):
            assert dispatcher.has_work()
            assert Group.claimed[-1] == trunk
            dispatcher.note_failure(FailedError("a worker died"))
    assert not dispatcher.has_work()
    dispatcher.close(records.INTERRUPTED)
    assert sorted(source.events) == [("failed: a worker died", "a"), ("failed: a worker died", "b")]


def test_group_that_cannot_start_fails_its_run_group_and_leaves_the_others():
    source = Source("a", "b")
    dispatcher = dispatcher_of(source)
    assert dispatcher.has_work()
    with pytest.raises(CannotStartError):
        dispatcher.note_failure(CannotStartError("no node"))
    dispatcher.close(records.FAILED)
    assert source.events == [("failed: no node", "a")]
    assert source.trunks == ["b"]


def test_trunk_that_cannot_be_claimed_fails_and_the_next_one_is_trained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Group, "broken", {"a"})
    source = Source("a", "b")
    assert dispatcher_of(source).has_work()
    assert source.events == [("failed: an error of the client of an object store", "a")]


@pytest.mark.parametrize(("seconds_left", "is_claimed"), [(60.0, False), (1.0, True)])
def test_next_run_group_is_claimed_shortly_before_the_end_and_goes_back_if_it_was_not_started(
    monkeypatch: pytest.MonkeyPatch, seconds_left: float, is_claimed: bool
):
    monkeypatch.setattr(module, "_seconds_left", lambda *_: seconds_left)
    monkeypatch.setattr(module.ray, "get", lambda _: {})
    source = Source("a", "b")
    dispatcher = dispatcher_of(source)
    assert dispatcher.has_work()
    current(dispatcher).runs = (MagicMock(spec=LoggedRun, folder=None),)
    dispatcher.poll(lambda _: None)
    dispatcher.poll(lambda _: None)  # claims no second one
    assert Group.claimed == (["a", "b"] if is_claimed else ["a"])
    dispatcher.close(records.INTERRUPTED)
    assert source.trunks == ["b"]
    assert (("put back", "b") in source.events) == is_claimed
