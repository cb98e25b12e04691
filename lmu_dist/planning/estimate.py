"""What is asked as a number with its 90 % interval: from the laws, or where they are not determined from measured curves.

A factor at one size needs no law: the curves of both families at that size give it, as in the report (scaling/compare), if
budgets have several seeds. So a ladder can answer although no law has the right form. Knowledge and a question in, an
`Estimate` out, and the cells that narrow it. Called by until, next_cell and proposal.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lmu_dist.planning.design import MARGIN, Knowledge, PlannedCell, Question, same_size
from lmu_dist.scaling.curve_factor import factor_with_noise
from lmu_dist.scaling.intervals import Interval
from lmu_dist.scaling.run_losses import RunLoss
from lmu_dist.scaling.trunk_noise import TrunkNoise

MIN_BUDGETS = 3  # of a curve, before a ladder may stop by it


class Estimate(NamedTuple):
    """A number and its interval; nan and None without one, and then `reason` says why.

    `freedom`: degrees of freedom of the noise that the interval assumes. `remark`: where it comes from, if not from laws, and
    `early` why a ladder must not stop by it yet.
    """

    value: float
    interval: Interval | None
    reason: str
    freedom: int
    remark: str = ""
    early: str = ""


def estimate(knowledge: Knowledge, question: Question) -> Estimate:
    """The number that is asked for, as far as the finished runs say."""
    value, interval, reason = knowledge.interval(question)
    if interval is None and question.kind == "factor" and any(knowledge.reasons[f] for f in question.families):
        curves = {f: [r for r in knowledge.results if _is_at(r, f, question)] for f in question.families}
        if all(curves.values()):
            base, new = (curves[family] for family in question.families)
            found, noise = factor_with_noise(base, new, TrunkNoise(knowledge.results))
            if noise and found.value is not None and found.interval is not None and found.losses is not None:
                # As much wider as an interval of laws, since it is looked at again and again.
                low, high = (found.value * (end / found.value) ** MARGIN for end in found.interval)
                top, bottom = found.losses
                remark = f"from measured curves, at losses of {top:.4g} to {bottom:.4g} nats, since {reason}"
                n_budgets = min(len({r.tokens for r in runs}) for runs in curves.values())
                early = f"a curve has {n_budgets} of {MIN_BUDGETS} budgets that stopping needs"
                freedom = int(noise.freedom + 1e-6)
                return Estimate(found.value, (low, high), "", freedom, remark, early if n_budgets < MIN_BUDGETS else "")
    return Estimate(value, interval, reason, knowledge.freedom)


def cells_of_curves(knowledge: Knowledge, question: Question, missing: Sequence[PlannedCell]) -> list[PlannedCell]:
    """The missing cells that narrow a factor where the form of a law is wrong: further seeds of its curves, cheapest first.

    More runs do not determine such a law. The interval of a curve depends on its budgets with the fewest seeds. Empty where the
    forms fit, for other questions, and when no seed is left for these budgets.
    """
    if question.kind != "factor" or not knowledge.unfit.intersection(question.families):
        return []
    found = list[PlannedCell]()
    for family in question.families:
        n_seeds = Counter(r.tokens for r in knowledge.results if _is_at(r, family, question))
        fewest = min(n_seeds.values(), default=0)
        found += [cell for cell in missing if _is_at(cell, family, question) and 0 < n_seeds[cell.tokens] == fewest]
    return sorted(found, key=lambda cell: (cell.steps * cell.step_flops, cell.seed, cell.key))


def _is_at(run: RunLoss | PlannedCell, family: str, question: Question) -> bool:
    return run.family == family and same_size(run.n_params, question.n_params)
