"""Which two families the factor of a study compares: its families and what the user asked for in, a `Pair` out.

Reports, `next` and `power` choose by the same rule, so that they speak of the same factor. `ladder.until` has no rule of its
own: it compares with plan.baseline.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lmu_dist.config import ConfigError
from lmu_dist.models import registry

CLAIMED_FACTOR = 10.0  # the paper's claim (arXiv 2110.02402): the transformer needs ten times the tokens of the LMU
FIRST_BASELINES = ("transformer", "llama")  # the first of these that has runs is the baseline by default
FIRST_FAMILIES = ("lmu", "lmu_modern")  # and the first of these is compared with it
MOST_RUNS = "by default, because it has most runs"


@dataclass(frozen=True)
class Pair:
    """A factor is the tokens that `base` needs divided by the tokens that `new` needs. `reason` says why `base` was taken."""

    base: str
    new: str
    reason: str = ""

    @property
    def name(self) -> str:
        """The name of the factor in MLflow, as in "lmu_over_transformer"."""
        return f"{self.new}_over_{self.base}"

    @property
    def claimed_factor(self) -> float | None:
        """The factor that the paper claims; None for pairs of which it claims none."""
        return CLAIMED_FACTOR if (self.base, self.new) == (PAPER.base, PAPER.new) else None


PAPER = Pair("transformer", "lmu")


def choose_pair(
    n_runs: Mapping[str, int],
    baseline: str | None = None,
    family: str | None = None,
    planned: str | None = None,
    known: str = "there are",
) -> Pair:
    """Returns the pair of a study whose families have `n_runs` runs each, in display order.

    `baseline` and `family` are what the user asked for, `planned` is plan.baseline of the study's ladder. Raises ConfigError
    for a family that is not there; `known` begins its list of those that are.
    """
    baseline = None if baseline is None else _own_name(n_runs, "--baseline", baseline, known)
    family = None if family is None else _own_name(n_runs, "--family", family, known)
    if family is not None and family == baseline:
        raise ConfigError(f"--family {family}: it is the baseline, too; {known} {', '.join(n_runs)}, take two of them")
    others = {name: n for name, n in n_runs.items() if name not in (baseline, family)}
    if len(n_runs) == 1 and (asked := baseline or family):
        option = "--baseline" if baseline else "--family"
        raise ConfigError(f"{option} {asked}: {known} {', '.join(n_runs)} only, so there is nothing to compare it with")
    if baseline is not None:
        return Pair(baseline, family or _first_of(FIRST_FAMILIES, others), "as --baseline asks for")
    if family is None and len(n_runs) == 1:  # there is no pair, and the report names what is missing
        [only] = n_runs
        return Pair(PAPER.base, PAPER.new if only == PAPER.base else only, "by default")
    base, reason = _default_baseline(others, planned, keep=family is None)
    others.pop(base)
    return Pair(base, family or _first_of(FIRST_FAMILIES, others), reason)


def _default_baseline(n_runs: Mapping[str, int], planned: str | None, keep: bool) -> tuple[str, str]:
    """The family that the others are compared with if none was asked for, and why.

    It is `planned` if that is there, else the transformer, else llama, else the family with most runs (of several the last one
    in display order). `keep`: the family whose factor is the headline by default is not taken for having most runs.
    """
    if planned is not None and planned in n_runs:
        return planned, "as plan.baseline of its ladder says"
    for name in FIRST_BASELINES:
        if name in n_runs:
            return name, "by default"
    kept = _first_of(FIRST_FAMILIES, n_runs) if keep else None
    return max((name for name in reversed(list(n_runs)) if name != kept), key=lambda name: n_runs[name]), MOST_RUNS


def _first_of(names: tuple[str, ...], there: Mapping[str, int]) -> str:
    return next((name for name in names if name in there), next(iter(there)))


def _own_name(n_runs: Mapping[str, int], option: str, reference: str, known: str) -> str:
    """The name of a family as runs have it; a reference path/to/file.py:CLASS has one, too."""
    name = registry.find(reference).name if registry.is_file_reference(reference) else reference
    if name not in n_runs:
        raise ConfigError(f"{option} {reference}: {known} {', '.join(n_runs)}")
    return name
