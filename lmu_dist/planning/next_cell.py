"""Which planned cells are worth their price: results, missing cells and questions in, ranked `Choice`s out.

While a family has too few runs for a law, cells are chosen to fill the space, the cheapest corners first. Then each choice is
the cell that narrows the interval of what is asked most per FLOP or hour, given the choices before it (V-optimal, greedily).
Where the form of a law is wrong, further seeds of the measured curves come before them (planning/estimate).
Called by proposal and until.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmu_dist.planning.design import MARGIN, Knowledge, PlannedCell, Question, quantile
from lmu_dist.planning.estimate import cells_of_curves
from lmu_dist.planning.first_cells import needed_cells
from lmu_dist.planning.prices import Costs
from lmu_dist.scaling.laws import Floats


@dataclass(frozen=True)
class Choice:
    """A cell that should be next, and what it is expected to bring.

    `ratio_before` and `ratio_after` are upper over lower end of the interval of what is asked, the geometric mean over several
    questions; None while there is no law. `cost` excludes the steps that the cell shares with cells before it.
    """

    cell: PlannedCell
    reason: str
    cost: float
    ratio_before: float | None = None
    ratio_after: float | None = None

    @property
    def gain(self) -> float:
        """By how much the logarithm of the interval's ratio shrinks, relative to what it was."""
        if self.ratio_before is None or self.ratio_after is None:
            return 0.0
        return 1 - float(np.log(self.ratio_after) / np.log(self.ratio_before))

    @property
    def gain_per_cost(self) -> float:
        """The gain per FLOP or hour."""
        return self.gain / self.cost if self.cost else 0.0


def next_cells(
    knowledge: Knowledge,
    questions: Sequence[Question],
    plan: Sequence[PlannedCell],
    missing: Sequence[PlannedCell],
    per: str = "flops",
    is_enough: Callable[[Sequence[Choice]], bool] = lambda _: False,
    limit: float = np.inf,
) -> list[Choice]:
    """Returns missing cells in the order in which they are worth their price, until `is_enough` of those chosen so far.

    `plan` has all cells, `missing` those that can be chosen. `limit` is the most that they may cost together.
    """
    missing_keys = {cell.key for cell in missing}
    chosen = _Chosen(Costs((cell for cell in plan if cell.key not in missing_keys), per), limit)
    for cell, reason in needed_cells(knowledge, questions, plan, missing):
        chosen.add(cell, reason)
    if any(knowledge.reasons[family] for question in questions for family in question.families) and chosen.choices:
        return chosen.choices
    of_curves = {question: cells_of_curves(knowledge, question, missing) for question in questions}
    for cell in (cell for cells in of_curves.values() for cell in cells):
        if not (chosen.choices and is_enough(chosen.choices)):
            chosen.add(cell, "a further seed of a measured curve, since the form of a law is wrong")
    others = [question for question in questions if not of_curves[question]]
    if chosen.choices and not others:  # a new budget of a curve would have one seed, and make its interval wider
        return chosen.choices
    questions = others or questions
    left = [cell for cell in missing if cell.key not in chosen.keys]
    state = _State(knowledge, questions)
    for choice in chosen.choices:
        state.add(choice.cell)
    while left and not (chosen.choices and is_enough(chosen.choices)):
        priced = np.array([chosen.costs.of(cell) for cell in left])
        scores = state.scores(left)
        scores[priced > limit - chosen.spent] = np.nan
        if not np.any(np.isfinite(scores)):
            break
        best = int(np.nanargmax((state.score - scores) / np.maximum(priced, 1e-300)))
        cell = left.pop(best)
        before = state.ratio
        state.add(cell)
        chosen.add(cell, state.reason, before, state.ratio)
    return chosen.choices


class _Chosen:
    """The cells that were chosen so far, each once, and what they cost together, which is at most `limit`."""

    def __init__(self, costs: Costs, limit: float) -> None:
        self.costs, self._limit, self.spent = costs, limit, 0.0
        self.choices, self.keys = list[Choice](), set[str]()

    def add(self, cell: PlannedCell, reason: str, before: float | None = None, after: float | None = None) -> None:
        """Chooses a cell, unless it costs more than is left. `before`, `after`: ratios, see Choice."""
        if cell.key in self.keys or self.spent + (cost := self.costs.of(cell)) > self._limit:
            return
        self.choices.append(Choice(cell, reason, cost, before, after))
        self.keys.add(cell.key)
        self.costs.choose(cell)
        self.spent += cost


class _State:
    """What is known after the cells that were chosen so far, if they were trained."""

    def __init__(self, knowledge: Knowledge, questions: Sequence[Question]) -> None:
        self._knowledge = knowledge
        families = {family for question in questions for family in question.families}
        self._information = {family: knowledge.information[family].copy() for family in families}
        self._gradients = [gradients for q in questions if (gradients := _gradients(knowledge, q))]
        self._freedom = knowledge.freedom
        self._rows = dict[str, Floats]()  # by key of the cell
        undetermined = [f"the law of {f} is assumed: {knowledge.reasons[f]}" for f in sorted(families) if knowledge.reasons[f]]
        self.reason = undetermined[0] if undetermined else "narrows the interval most for its price"

    @property
    def score(self) -> float:
        """The mean of ln(reach) of the questions; 0 without any that can be asked."""
        if not self._gradients:
            return 0.0
        variances = np.array([self._variance(gradients) for gradients in self._gradients])
        return float(_log_reach(variances, self._freedom).mean())

    @property
    def ratio(self) -> float:
        """Upper over lower end of the interval; the geometric mean over several questions."""
        return float(np.exp(2 * np.exp(self.score)))

    def scores(self, cells: Sequence[PlannedCell]) -> Floats:
        """The score after each of the cells by itself."""
        scores = np.full(len(cells), np.nan)
        if not self._gradients:  # the cheapest cell is next
            return np.full(len(cells), -1.0)
        by_family = defaultdict[str, list[int]](list)
        for i, cell in enumerate(cells):
            by_family[cell.family].append(i)
        variances = [self._variance(gradients) for gradients in self._gradients]
        for family, which in by_family.items():
            if family not in self._information:
                continue
            rows, groups = np.array([self._row(cells[i]) for i in which]), [cells[i].group for i in which]
            after, information = np.zeros(len(which)), self._information[family]
            for gradients, variance in zip(self._gradients, variances, strict=True):
                reduced = np.full(len(which), variance)
                if family in gradients:
                    now = information.variances(gradients[family])
                    reduced += information.variances(gradients[family], rows, groups) - now
                after += _log_reach(reduced, self._freedom + 1)
            scores[which] = after / len(self._gradients)
        return scores

    def add(self, cell: PlannedCell) -> None:
        """Takes a cell as measured. Those of families that nothing is asked of say nothing."""
        if cell.family in self._information:
            self._information[cell.family].add(self._row(cell), cell.group)
            self._freedom += 1

    def _row(self, cell: PlannedCell) -> Floats:
        if cell.key not in self._rows:
            self._rows[cell.key] = self._knowledge.rows(cell.family, [cell.n_params], [cell.tokens])[0]
        return self._rows[cell.key]

    def _variance(self, gradients: Mapping[str, Floats]) -> float:
        return float(sum(self._information[family].variances(g) for family, g in gradients.items()))


def _log_reach(variances: Floats, freedom: int) -> Floats:
    """The logarithm of half the width of intervals of logarithms with these variances."""
    return np.log(MARGIN * quantile(freedom)) + 0.5 * np.log(np.maximum(variances, 1e-300))


def _gradients(knowledge: Knowledge, question: Question) -> dict[str, Floats]:
    """The gradients of a question; those of a factor without a common loss are taken at the higher of two middle losses."""
    gradients = knowledge.value(question)[1]
    if gradients or question.kind != "factor":
        return gradients
    tokens = [r.tokens for r in knowledge.results] or [1]
    middle = float(np.exp(np.mean(np.log(tokens))))
    loss = max(float(knowledge.laws[family].loss(question.n_params, middle)) for family in question.families)
    gradients = knowledge.factor_gradients(question, loss)[1]
    return gradients if all(np.all(np.isfinite(g)) for g in gradients.values()) else {}
