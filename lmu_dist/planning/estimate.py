"""What is asked as a number with its 90 % interval: from the laws, or where they are not determined from measured curves.

A factor at one size needs no law: the curves of both families at that size give it, as in the report (scaling/compare), if
budgets have several seeds. So a ladder can answer although no law has the right form. Knowledge and a question in, an
`Estimate` out, and the cells that narrow it. Called by until, next_cell and proposal.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lmu_dist.planning.design import MARGIN, Knowledge, PlannedCell, Question, Result, same_size
from lmu_dist.scaling.efficiency import Factor, SeedNoise, factor_from_curves, lower_envelope, seed_noise
from lmu_dist.scaling.intervals import Interval


class Estimate(NamedTuple):
    """A number and its interval; nan and None without one, and then `reason` says why.

    `freedom`: degrees of freedom of the noise that the interval assumes. `remark`: where it comes from, if not from laws.
    """

    value: float
    interval: Interval | None
    reason: str
    freedom: int
    remark: str = ""


def estimate(knowledge: Knowledge, question: Question) -> Estimate:
    """The number that is asked for, as far as the finished runs say."""
    value, interval, reason = knowledge.interval(question)
    if interval is None and question.kind == "factor" and any(knowledge.reasons[f] for f in question.families):
        noise = _noise(knowledge.results)
        found = _from_curves(knowledge.results, question, noise)
        if noise is not None and found.value is not None and found.interval is not None:
            # As much wider as an interval of laws, since it is looked at again and again.
            low, high = (found.value * (end / found.value) ** MARGIN for end in found.interval)
            return Estimate(found.value, (low, high), "", noise.freedom, f"from measured curves, since {reason}")
    return Estimate(value, interval, reason, knowledge.freedom)


def cells_of_curves(knowledge: Knowledge, question: Question, missing: Sequence[PlannedCell]) -> list[PlannedCell]:
    """The missing cells that narrow a factor where the form of a law is wrong: further seeds of its curves, cheapest first.

    More runs do not determine such a law. The interval of the curves depends on the budget with the fewest seeds, so these come
    first. Empty where the forms fit, for other questions, and when all budgets of the curves have all their seeds.
    """
    if question.kind != "factor" or not knowledge.unfit.intersection(question.families):
        return []
    found = list[PlannedCell]()
    for family in question.families:
        n_seeds = Counter(r.tokens for r in knowledge.results if _is_at(r, family, question))
        cells = [cell for cell in missing if _is_at(cell, family, question) and n_seeds[cell.tokens]]
        fewest = min((n_seeds[cell.tokens] for cell in cells), default=0)
        found += [cell for cell in cells if n_seeds[cell.tokens] == fewest]
    return sorted(found, key=lambda cell: (cell.steps * cell.step_flops, cell.seed, cell.key))


def _from_curves(results: Sequence[Result], question: Question, noise: SeedNoise | None) -> Factor:
    curves, n_seeds = [], []
    for family in question.families:
        runs = [r for r in results if _is_at(r, family, question)]
        if not runs:
            return Factor(None, None, None, None, None, "no run at this size")
        curves.append(lower_envelope([r.tokens for r in runs], [r.loss for r in runs]))
        n_seeds.append(min(Counter(r.tokens for r in runs).values()))
    return factor_from_curves(curves[0], curves[1], noise, (n_seeds[0], n_seeds[1]))


def _noise(results: Sequence[Result]) -> SeedNoise | None:
    groups = defaultdict[tuple[str, int, int], list[float]](list)
    for r in results:
        groups[r.family, r.n_params, r.tokens].append(r.loss)
    return seed_noise(list(groups.values()))


def _is_at(run: Result | PlannedCell, family: str, question: Question) -> bool:
    return run.family == family and same_size(run.n_params, question.n_params)
