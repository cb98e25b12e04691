"""What cells cost in FLOPs or hours of workers, if cells of a trunk share steps: cells in, costs out."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from lmu_dist.planning.design import PlannedCell


def trunk_cost(cells: Iterable[PlannedCell], done: Sequence[PlannedCell], per: str) -> float:
    """The cost of training cells of one trunk together, of which `done` are trained already."""
    cost, branch_points = 0.0, [cell.decay_start for cell in done]
    for cell in sorted(cells, key=lambda cell: cell.steps):
        start = max((step for step in branch_points if step <= cell.decay_start), default=0)
        cost += (cell.steps - start) * cell.step_cost(per)
        branch_points.append(cell.decay_start)
    return cost


def total_cost(cells: Iterable[PlannedCell], per: str) -> float:
    """The cost of training cells that share the steps of their trunks."""
    trunks = defaultdict[str, list[PlannedCell]](list)
    for cell in cells:
        trunks[cell.trunk].append(cell)
    return sum(trunk_cost(trunk, (), per) for trunk in trunks.values())


class Costs:
    """The cost of a further cell of a wave: cells of one trunk share steps with what is done and what was chosen before."""

    def __init__(self, done: Iterable[PlannedCell], per: str) -> None:
        self.per = per
        self._done = defaultdict[str, list[PlannedCell]](list)
        self._chosen = defaultdict[str, list[PlannedCell]](list)
        for cell in done:
            self._done[cell.trunk].append(cell)

    def of(self, cell: PlannedCell) -> float:
        """What the cell adds to the cost of the wave."""
        done, chosen = self._done[cell.trunk], self._chosen[cell.trunk]
        return trunk_cost([*chosen, cell], done, self.per) - trunk_cost(chosen, done, self.per)

    def choose(self, cell: PlannedCell) -> None:
        """Adds a cell to the wave."""
        self._chosen[cell.trunk].append(cell)
