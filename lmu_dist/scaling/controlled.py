"""The controlled comparisons of a study: factors of pairs that differ in one thing, in a table of their own. For results.

What a modern block and a modern mixer bring is mixed up in the factor of the paper's LMU over a transformer of today. These
pairs separate the two: the paper's mixers in the paper's block, the paper's LMU against the transformer of today, and both
mixers in the block of today.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lmu_dist.scaling.answer import best_known_factor, explain_missing
from lmu_dist.scaling.collect import Study
from lmu_dist.scaling.compare import Comparison
from lmu_dist.scaling.efficiency import Factor
from lmu_dist.scaling.pair import PAPER

PAIRS = (  # new, base, what their factor shows
    (PAPER.new, PAPER.base, "the paper's claim: both mixers in the paper's block"),
    ("lmu", "llama", "the paper's LMU beside a transformer of today"),
    ("lmu_modern", "llama", "what is left of it: both mixers in the same block of today"),
)


@dataclass(frozen=True)
class ControlledComparison:
    """The factor of one pair at the largest size that both families have, by the rules of the headline.

    `comparison`, size and factor are None if the study has no size at which both were trained. `reason` says why there is no
    interval. `source` of the factor: laws, curves or none.
    """

    new: str
    base: str
    shows: str
    comparison: Comparison | None
    n_params: int | None
    factor: Factor | None
    source: str
    reason: str


def controlled_comparisons(study: Study, compared: Callable[[str, str], Comparison]) -> tuple[ControlledComparison, ...]:
    """Returns all of PAIRS; `compared` compares a base with a new family of the study."""
    return tuple(_controlled(study, compared, new, base, shows) for new, base, shows in PAIRS)


def _controlled(
    study: Study, compared: Callable[[str, str], Comparison], new: str, base: str, shows: str
) -> ControlledComparison:
    comparison = compared(base, new) if {base, new} <= set(study.families) else None
    if comparison is None or not comparison.sizes:
        reason = explain_missing(study, base, new, "the study")
        return ControlledComparison(new, base, shows, None, None, None, "none", reason)
    largest = comparison.sizes[-1]
    factor, source = best_known_factor(largest)
    return ControlledComparison(new, base, shows, comparison, largest.n_params, factor, source, factor.remark)
