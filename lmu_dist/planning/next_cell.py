"""Which planned cells are worth their price: results, missing cells and questions in, ranked `Choice`s out.

While a family has too few runs for a law, cells are chosen to fill the space, the cheapest corners first. Then each choice is
the cell that narrows the interval of what is asked most per FLOP or hour, given the choices before it (V-optimal, greedily).
Called by cli/next and until.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmu_dist.planning.design import MARGIN, N_PARAMETERS, Knowledge, PlannedCell, Question, quantile, same_size
from lmu_dist.scaling.laws import Chinchilla, Floats
from lmu_dist.scaling.table import size_bins

MIN_RUNS = N_PARAMETERS + Chinchilla.MIN_EXTRA_RUNS  # of a family, before it has a law
MIN_VALUES = 3  # of N and of D
MIN_OVERLAP = 1.2  # of the tokens at which both families reach the compared losses


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
    costs = Costs((cell for cell in plan if cell.key not in missing_keys), per)
    choices, spent, left = list[Choice](), 0.0, list(missing)
    for cell, reason in _needed(knowledge, questions, plan, left):
        if spent + (cost := costs.of(cell)) <= limit:
            choices.append(Choice(cell, reason, cost))
            costs.choose(cell)
            spent += cost
    if any(knowledge.reasons[family] for question in questions for family in question.families) and choices:
        return choices
    chosen = {choice.cell.key for choice in choices}
    left = [cell for cell in left if cell.key not in chosen]
    state = _State(knowledge, questions)
    for choice in choices:
        state.add(choice.cell)
    while left and not (choices and is_enough(choices)):
        priced = np.array([costs.of(cell) for cell in left])
        scores = state.scores(left)
        scores[priced > limit - spent] = np.nan
        if not np.any(np.isfinite(scores)):
            break
        best = int(np.nanargmax((state.score - scores) / np.maximum(priced, 1e-300)))
        cell = left.pop(best)
        before = state.ratio
        state.add(cell)
        choices.append(Choice(cell, state.reason, float(priced[best]), before, state.ratio))
        costs.choose(cell)
        spent += float(priced[best])
    return choices


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
        """The score after each of the cells alone."""
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
        """Takes a cell as measured."""
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


def _needed(
    knowledge: Knowledge, questions: Sequence[Question], plan: Sequence[PlannedCell], missing: Sequence[PlannedCell]
) -> list[tuple[PlannedCell, str]]:
    """The cells without which there is no answer at all, with the reason, in turn of the families."""
    found = dict[str, tuple[PlannedCell, str]]()
    families = dict.fromkeys(family for question in questions for family in question.families)
    queues = [_start(knowledge, family, plan, missing) for family in families]
    for position in range(max(map(len, queues), default=0)):
        for queue in queues:
            if position < len(queue):
                found.setdefault(queue[position][0].key, queue[position])
    for question in questions:
        if question.kind == "factor":
            for cell in _for_common_loss(knowledge, question, missing):
                found.setdefault(cell.key, (cell, f"both families must reach one loss at N = {question.n_params:,.0f}"))
    return list(found.values())


def _start(
    knowledge: Knowledge, family: str, plan: Sequence[PlannedCell], missing: Sequence[PlannedCell]
) -> list[tuple[PlannedCell, str]]:
    """The missing cells of a space-filling start: three corners, the middle, then the cheapest, until there is a law."""
    if not (why := knowledge.reasons[family]):
        return []
    done = [r for r in knowledge.results if r.family == family]
    cells = [cell for cell in plan if cell.family == family]
    can_choose = {cell.key for cell in missing}
    cheapest = sorted((c for c in cells if c.key in can_choose), key=lambda c: (c.steps * c.step_flops, c.seed, c.key))
    chosen, n_runs = list[PlannedCell](), len(done)
    at = {(r.n_params, r.tokens) for r in done}
    for n_params, tokens in _corners_and_middle(cells):
        if (n_params, tokens) not in at:
            chosen += [cell for cell in cheapest if (cell.n_params, cell.tokens) == (n_params, tokens)][:1]
    points = [*at, *((cell.n_params, cell.tokens) for cell in chosen)]
    keys = {cell.key for cell in chosen}
    rest = [cell for cell in cheapest if cell.key not in keys]
    while rest and (n_runs + len(chosen) < MIN_RUNS or not _has_enough_values(points)):
        # First points without a run, then further seeds; a size or a budget that is missing comes before both.
        cell = min(rest, key=lambda c: (_repeats(c, points), (c.n_params, c.tokens) in points, rest.index(c)))
        rest.remove(cell)
        chosen.append(cell)
        points.append((cell.n_params, cell.tokens))
    return [(cell, f"start: {why}") for cell in chosen]


def _corners_and_middle(cells: Sequence[PlannedCell]) -> list[tuple[int, int]]:
    """(N, D) of the corners of a grid but the dearest, cheapest first, and of its middle."""
    sizes = sorted({cell.n_params for cell in cells})
    budgets = {n: sorted({cell.tokens for cell in cells if cell.n_params == n}) for n in sizes}
    if not sizes:
        return []
    small, middle, large = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    corners = [(small, budgets[small][0]), (small, budgets[small][-1]), (large, budgets[large][0])]
    return list(dict.fromkeys([*corners, (middle, budgets[middle][len(budgets[middle]) // 2])]))


def _has_enough_values(points: Sequence[tuple[int, int]]) -> bool:
    return all(len(set(size_bins(np.array(v, np.float64)))) >= MIN_VALUES for v in zip(*points, strict=True))


def _repeats(cell: PlannedCell, points: Sequence[tuple[int, int]]) -> bool:
    """Whether a cell brings no new size and no new budget although there are too few of them."""
    if _has_enough_values(points):
        return False
    return any(same_size(cell.n_params, n) for n, _ in points) and any(same_size(cell.tokens, d) for _, d in points)


def _for_common_loss(knowledge: Knowledge, question: Question, missing: Sequence[PlannedCell]) -> list[PlannedCell]:
    """The cheapest missing cells at the size of a factor with which both families reach common losses."""
    if knowledge.compared_loss(question) is not None and not any(knowledge.reasons[f] for f in question.families):
        return []
    base, new = question.families
    options = {f: _budgets(knowledge, f, question.n_params, missing) for f in question.families}
    best: tuple[float, list[PlannedCell]] = (np.inf, [])
    for of_base in options[base]:
        for of_new in options[new]:
            added = [*of_base[2], *of_new[2]]
            cost = total_cost(added, "flops")
            if cost < best[0] and _overlap(knowledge, question, of_base[:2], of_new[:2]) >= MIN_OVERLAP:
                best = cost, added
    return best[1]


def _budgets(
    knowledge: Knowledge, family: str, n_params: float, missing: Sequence[PlannedCell]
) -> list[tuple[int, int, list[PlannedCell]]]:
    """(fewest, most tokens) that a family can have at a size, and the cells that are to be trained for it."""
    done = knowledge.tokens_at(family, n_params)
    cells = dict[int, PlannedCell]()
    for cell in sorted(missing, key=lambda c: c.seed, reverse=True):
        if cell.family == family and same_size(cell.n_params, n_params) and cell.tokens not in done:
            cells[cell.tokens] = cell
    tokens = sorted({*done, *cells})
    pairs = [(low, high) for i, low in enumerate(tokens) for high in tokens[i + 1 :]]
    if done:
        pairs = [(low, high) for low, high in pairs if low <= min(done) and high >= max(done)]
    return [(low, high, [cells[d] for d in (low, high) if d in cells]) for low, high in pairs]


def _overlap(knowledge: Knowledge, question: Question, of_base: tuple[int, int], of_new: tuple[int, int]) -> float:
    """By which factor of the base's tokens the losses that both families reach extend; below 1 if there are none."""
    base, new = (knowledge.laws[f] for f in question.families)
    n = question.n_params
    losses = [law.loss(n, np.array(d, np.float64)) for law, d in ((base, of_base), (new, of_new))]
    top, bottom = min(float(v[0]) for v in losses), max(float(v[1]) for v in losses)
    if not top > bottom:
        return 0.0
    return float(base.tokens_for(bottom, n) / base.tokens_for(top, n))
