"""Which cells of a ladder with `ladder.until` are trained next, and whether it may stop: cells and finished runs in, keys out.

The design is in planning/until; here cells and runs become what it needs. Decides by the runs that have ended and by the slots
of the cluster, and keeps nothing: the same command goes on after any failure, and may look once more if that was in a wave.
Called by ladder.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from lmu_dist import records
from lmu_dist.config import Config, ConfigError
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.record import FinishedRun
from lmu_dist.planning.cost import StepTime, read_calibration
from lmu_dist.planning.design import PlannedCell
from lmu_dist.planning.grid import GridCell
from lmu_dist.planning.learn import learn
from lmu_dist.planning.next_cell import Choice
from lmu_dist.planning.plan_rows import planned_cell, seconds_of_steps
from lmu_dist.planning.prices import total_cost
from lmu_dist.planning.until import Verdict, assumed_law, judge, next_wave, targets_of, wave_size
from lmu_dist.scaling.run_losses import RunLoss, losses_of


class Waves:
    """The waves of a ladder. `chosen` has the keys of the cells of this wave; `message` says why the ladder stopped."""

    def __init__(self, cells: Sequence[Cell], config: Config) -> None:
        """Raises ConfigError if the cells cannot answer what ladder.until asks."""
        assert config.ladder is not None
        assert config.ladder.until is not None
        self._config, self._until = config, config.ladder.until
        self._plan = plan_of(cells)
        self._targets = targets_of(config, self._plan)
        self.chosen: frozenset[str] = frozenset()
        self.message = ""

    def advance(self, finished: Mapping[str, FinishedRun], failed: Collection[str], n_slots: int) -> None:
        """Chooses the next wave by the runs that have ended; it is empty if the ladder stops. `failed`: names of cells."""
        choices, self.message = self._next(finished, failed, n_slots)
        self.chosen = frozenset(choice.cell.key for choice in choices)

    def choose(self, keys: Collection[str]) -> None:
        """Makes cells the next wave."""
        self.chosen = frozenset(keys)

    def _next(self, finished: Mapping[str, FinishedRun], failed: Collection[str], n_slots: int) -> tuple[list[Choice], str]:
        until, planned = self._until, self._plan
        per = "hours" if until.hours is not None else "flops"
        ended = [(cell, finished[cell.key].record) for cell in planned if cell.key in finished]
        spent = sum((cell.steps - record.fork_step) * cell.step_cost(per) for cell, record in ended)
        results = [result for _, record in ended if (result := result_of(record)) is not None]
        families = list(dict.fromkeys(family for target in self._targets for family in target.question.families))
        knowledge = learn(results, families, assumed_law(self._config), self._config.plan.noise)
        verdicts = judge(knowledge, self._targets)
        if all(verdict.reached for verdict in verdicts):
            return [], self._summary("the intervals are narrow enough", verdicts, len(ended), spent, per)
        missing = [cell for cell in planned if cell.key not in finished and cell.name not in failed]
        if not missing:
            which = "no cell is left that has not failed" if failed else "all planned cells have ended"
            return [], self._summary(which, verdicts, len(ended), spent, per)
        n_least = wave_size(len(ended))

        def is_full(chosen: Sequence[PlannedCell]) -> bool:
            trunks = {cell.trunk: min(cell.n_workers, n_slots) for cell in chosen}
            return len(chosen) >= n_least and sum(trunks.values()) >= n_slots

        budget = until.hours or until.flops or math.inf
        choices = next_wave(knowledge, verdicts, planned, missing, is_full, per, budget - spent)
        spent_text = f"the budget of {budget:.3g} {_unit(per)} is spent, and no cell fits into the rest"
        return choices, "" if choices else self._summary(spent_text, verdicts, len(ended), spent, per)

    def _summary(self, why: str, verdicts: Sequence[Verdict], n_ended: int, spent: float, per: str) -> str:
        share = spent / total_cost(self._plan, per)
        cost = f"{n_ended} of {len(self._plan)} cells, {spent:.3g} {_unit(per)} ({share:.0%} of the plan's)"
        return f"ladder.until: stopped, because {why}; {cost}; {'; '.join(map(str, verdicts))}"


def plan_of(cells: Sequence[Cell]) -> list[PlannedCell]:
    """The cells of a ladder with their prices; without hours if the calibration cannot be read."""
    calibration: list[StepTime] = []
    with suppress(ConfigError):
        calibration = read_calibration(cells[0].config.storage_folder)
    of_grid = [GridCell(cell.config, cell.shape) for cell in cells]
    seconds = seconds_of_steps(of_grid, calibration)
    return [
        planned_cell(made, cell.key, cell.name, cell.trunk, time, cell.parameters.non_embedding, cell.flops.training)
        for cell, made, time in zip(cells, of_grid, seconds, strict=True)
    ]


def result_of(record: records.RunRecord) -> RunLoss | None:
    """The result of a run that a fit may use; None for any other, as in scaling/collect."""
    is_usable = record.status == records.COMPLETE and record.phase == "decayed"
    if not (is_usable and math.isfinite(record.val_loss_nats) and record.val_loss_nats > 0):
        return None
    return losses_of([record])[0]


def _unit(per: str) -> str:
    return "FLOPs" if per == "flops" else "hours of workers"
