"""The cells without which there is no answer: a space-filling start, and runs of two families that reach the same losses.

Called by next_cell.
"""

from collections.abc import Sequence

import numpy as np

from lmu_dist.planning.design import Knowledge, PlannedCell, Question, same_size
from lmu_dist.planning.information import N_PARAMETERS
from lmu_dist.planning.prices import total_cost
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.table import size_bins

MIN_RUNS = N_PARAMETERS + Chinchilla.MIN_EXTRA_RUNS  # of a family, before it has a law
MIN_VALUES = 3  # of N and of D
MIN_OVERLAP = 1.2  # of the tokens at which both families reach the compared losses


def needed_cells(
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
