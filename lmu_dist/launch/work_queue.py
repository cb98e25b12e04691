"""The work of a driver, and where its groups of workers get it: a Ray actor on the node of the driver or of its trials.

A work item is the cells of one trunk. A group of workers belongs to a process that claims runs, such as a trial of a ladder.
That process takes work items here, and gives run groups to rank 0 of its workers here, because neither can call the other.
A trial of a search gets its cell here. Called by worker_group, worker, ladder, tune and trials.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.actor import ActorProxy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmu_dist.launch.cell import Cell
from lmu_dist.tracking.run_identity import LoggedRun


@dataclass(frozen=True)
class RunGroup:
    """Cells that a group of workers trains one after the other."""

    cells: tuple[Cell, ...]  # of one trunk, fewest tokens first
    runs: tuple[LoggedRun, ...]  # of the cells
    report_to_tune: bool  # whether Ray Tune gets a report of every evaluation


class WorkItem(NamedTuple):
    """The cells of a trunk that are missing, and how many workers train them."""

    cells: tuple[Cell, ...]
    n_workers: int


@dataclass(frozen=True)
class SearchTrial:
    """What a trial of a search trains, which its driver finds out from the sampled settings."""

    cell: Cell | None  # None if there is an error
    evaluations: tuple[tuple[int, float], ...] = ()  # tokens and validation loss, in nats, of earlier starts of the cell
    error: str = ""


@dataclass
class WorkState:
    """What a driver knows of its work items, by index."""

    running: dict[int, str] = field(default_factory=dict)  # name of the group of workers that has the item
    ended: dict[int, str] = field(default_factory=dict)  # "" or why it failed
    busy: set[int] = field(default_factory=set)  # of those that ended: another driver has it, or MLflow is unavailable


class WorkList:
    """Work items in order. A new group of workers reserves its first one; it then takes all that need as many workers."""

    def __init__(self, items: Sequence[WorkItem], n_slots: int) -> None:
        """`n_slots`: how many workers the cluster can hold; a run with cluster.min_workers may get fewer than it asks for."""
        self._items, self._n_slots, self._reserved = items, n_slots, dict[str, int]()
        self._pending = dict.fromkeys(range(len(items)))  # in order
        self._state = WorkState()

    def reserve(self, group: str, n_free: int) -> int | None:
        """Reserves the first item that fits for a new group, if `n_free` workers can be started.

        Returns how many workers the group must have; 0 while none fits, None if no item is left.
        """
        for index in self._pending:
            if min(n_workers := self._items[index].n_workers, self._n_slots) <= n_free:
                del self._pending[index]
                self._reserved[group] = index
                self._state.running[index] = group
                return n_workers
        return 0 if self._pending else None

    def take(self, group: str, n_workers: int) -> tuple[int, tuple[Cell, ...]] | None:
        """The index and the cells of the group's next item; None if no item for so many workers is left."""
        index = self._reserved.pop(group, None)
        if index is None:
            index = next((i for i in self._pending if self._items[i].n_workers == n_workers), None)
        if index is None:
            return None
        self._pending.pop(index, None)
        self._state.running[index] = group
        return index, self._items[index].cells

    def put_back(self, index: int) -> None:
        """Makes an item that was taken, and not tried, the next one to take."""
        self._state.running.pop(index, None)
        self._pending = {index: None} | self._pending

    def end(self, index: int, error: str = "", busy: bool = False) -> None:
        """Notes that an item has ended: its cells have records, or why they have not."""
        self._state.running.pop(index, None)
        self._state.ended[index] = error
        if busy:
            self._state.busy.add(index)

    def state(self) -> WorkState:
        """Which items are running and which have ended."""
        return self._state


class WorkQueue:
    """The actor: the work list, and a rendezvous point for each group of workers and the process that claims its runs."""

    def __init__(self, items: Sequence[WorkItem], n_slots: int) -> None:
        self._list = WorkList(items, n_slots)
        self._rendezvous = defaultdict[str, Rendezvous](Rendezvous)  # by the name of the group
        self._search_trials = defaultdict[str, asyncio.Future[SearchTrial]](asyncio.Future)  # by id

    @ray.method
    async def reserve(self, group: str, n_free: int) -> int | None:
        """See WorkList."""
        return self._list.reserve(group, n_free)

    @ray.method
    async def take(self, group: str, n_workers: int) -> tuple[int, tuple[Cell, ...]] | None:
        """See WorkList."""
        return self._list.take(group, n_workers)

    @ray.method
    async def put_back(self, index: int) -> None:
        """See WorkList."""
        self._list.put_back(index)

    @ray.method
    async def end(self, index: int, error: str, busy: bool) -> None:
        """See WorkList."""
        self._list.end(index, error, busy)

    @ray.method
    async def state(self) -> WorkState:
        """See WorkList."""
        return self._list.state()

    @ray.method
    async def give_to_search_trial(self, trial_id: str, trial: SearchTrial) -> None:
        """Called by the driver of a search: answers `search_trial`."""
        self._search_trials[trial_id].set_result(trial)

    @ray.method
    async def search_trial(self, trial_id: str) -> SearchTrial:
        """Called by a trial of a search: waits for what it trains."""
        return await self._search_trials[trial_id]

    @ray.method
    async def next_run_group(self, group: str) -> RunGroup | None:
        """Called by rank 0 of the workers: waits for the next run group; None if there is no more."""
        return await self._rendezvous[group].request()

    @ray.method
    async def workers_are_ready(self, group: str) -> bool:
        """Waits until the workers ask for a run group. False if the group was closed."""
        return await self._rendezvous[group].wait_for_request()

    @ray.method
    async def assign(self, group: str, run_group: RunGroup | None) -> None:
        """Answers the workers."""
        self._rendezvous[group].reply(run_group)

    @ray.method
    async def close(self, group: str) -> None:
        """Ends `workers_are_ready` of a group."""
        self._rendezvous[group].close()


class Rendezvous:
    """Where the workers of a group ask for a run group, and the process that claims runs answers."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._request: asyncio.Future[RunGroup | None] | None = None
        self._closed = False

    async def request(self) -> RunGroup | None:
        """Waits for the answer."""
        if self._request is not None and not self._request.done():
            self._request.set_result(None)  # of workers that died: nobody reads it
        self._request = asyncio.get_running_loop().create_future()
        self._changed.set()
        return await self._request

    async def wait_for_request(self) -> bool:
        """Waits until the workers ask. False if the rendezvous was closed."""
        while self._request is None and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        return not self._closed

    def reply(self, run_group: RunGroup | None) -> None:
        """Answers the request of the living workers."""
        if self._request is not None and not self._request.done():
            self._request.set_result(run_group)
        self._request = None

    def close(self) -> None:
        """Ends `wait_for_request`."""
        self._closed = True
        self._changed.set()


def start_work_queue(items: Sequence[WorkItem], n_slots: int, node_id: str) -> ActorProxy[WorkQueue]:
    """Starts the actor on a node."""
    node: Any = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=node)(WorkQueue).remote(items, n_slots)
