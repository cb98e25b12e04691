"""Puts the result of a study into sentences: a comparison of two families in, an `Answer` out.

The sentences claim no more than the 90 % intervals support.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmu_dist.scaling.collect import Study
from lmu_dist.scaling.compare import Comparison, SizeComparison
from lmu_dist.scaling.efficiency import Factor
from lmu_dist.scaling.pair import PAPER, Pair
from lmu_dist.scaling.trunk_noise import TrunkNoise

NOT_DETERMINED = "Not determined"
SOURCES = {"laws": "the fitted scaling laws", "curves": "the curves of loss against tokens"}


@dataclass(frozen=True)
class Answer:
    """The answer to the study's question: verdict, sentences, and the factor at the largest size, on which it is based.

    `others` names smaller sizes whose verdict is different. `factor` may be unknown.
    """

    verdict: str
    sentence: str
    others: str
    n_params: int | None
    factor: Factor | None
    source: str  # laws | curves | none
    growth: str
    caveats: tuple[str, ...]


def answer(
    study: Study,
    headline: Comparison | None,
    noise: TrunkNoise,
    other_laws: Mapping[str, Sequence[str]] | None = None,
    pair: Pair = PAPER,
) -> Answer:
    """Returns the answer from the comparison of a pair of families; `headline` is None if the study has no such comparison.

    `other_laws` has, for each family whose runs support other laws than the one of its factors, the names of these.
    """
    caveats = _caveats(study, noise)
    if headline is None or not headline.sizes:
        sentence = f"This study cannot answer the question: {explain_missing(study, pair.base, pair.new)}."
        return Answer(NOT_DETERMINED, sentence, "", None, None, "none", "", caveats)
    largest = headline.sizes[-1]
    factor, source = best_known_factor(largest)
    if source == "laws":
        caveats += _law_caveats(study, pair, other_laws or {})
    verdict = _verdict(factor, pair)
    base, new = study.title(pair.base), study.title(pair.new)
    at_size, tokens = f"At N = {largest.n_params:,} parameters", f"{_format_factor(factor)} as many tokens as the {new}"
    if factor.interval is not None:
        undecided = factor.interval[0] < 1 < factor.interval[1]
        which = " The interval includes 1, so the study does not show which of the two needs fewer tokens." if undecided else ""
        needs = f"{at_size}, the {base} needs {tokens} to reach the same loss"
        sentence = f"{needs} (90 % interval in brackets; computed from {SOURCES[source]}).{which}"
    elif factor.value is not None:
        sentence = f"{at_size}, the {base} needs {tokens} to reach the same loss. "
        sentence += f"This factor has no interval ({factor.remark}), so it does not decide the question."
    else:
        sentence = f"{at_size}, the {base} seems to need {tokens} to reach the same loss. "
        sentence += f"The error of this bound is unknown: {factor.remark}."
    others = [
        f"At N = {size.n_params:,} the verdict is different: {_verdict(other, pair).lower()}, namely {_format_factor(other)}."
        for size in headline.sizes[:-1]
        if _verdict(other := best_known_factor(size)[0], pair) not in (verdict, NOT_DETERMINED)
    ]
    summary = f"{verdict}: {_format_factor(factor)}" if factor.interval else verdict
    return Answer(summary, sentence, " ".join(others), largest.n_params, factor, source, _growth(headline), caveats)


def best_known_factor(size: SizeComparison) -> tuple[Factor, str]:
    """Returns the factor to show for a size, and its source: from the laws if that has an interval, else from the curves."""
    return (size.laws, "laws") if size.laws.interval is not None else (size.curves, "curves")


def _verdict(factor: Factor, pair: Pair) -> str:
    """Compares the interval with the factor that the paper claims for the pair, else with 1."""
    if factor.interval is None:
        return NOT_DETERMINED
    low, high = factor.interval
    if (claimed := pair.claimed_factor) is None:
        return "More data-efficient" if low > 1 else "Less data-efficient" if high < 1 else "No difference found"
    if low > claimed:
        return f"More than {claimed:g} times"
    return f"Less than {claimed:g} times" if high < claimed else f"{claimed:g} times is possible"


def _format_factor(factor: Factor) -> str:
    if factor.value is None:
        assert factor.bound is not None
        return f"{'more' if factor.bound[0] == '>' else 'less'} than {factor.bound[1]:.3g} times"
    ends = f" ({factor.interval[0]:.3g} to {factor.interval[1]:.3g})" if factor.interval else ""
    return f"{factor.value:.3g} times{ends}"


def explain_missing(study: Study, base: str, new: str, subject: str = "it") -> str:
    """Returns why a study, which a sentence calls `subject`, has no factor of two families at any size."""
    missing = [name for name in (new, base) if name not in study.families]
    if not missing:
        return f"{study.title(new)} and {study.title(base)} were not trained at a common size"
    out = Counter(o.reason.split(":")[0] for o in study.left_out if o.record and o.record.family in missing)
    reasons = "; left out: " + ", ".join(f"{n} {reason}" for reason, n in out.items()) if out else ""
    return f"{subject} has no finished, comparable run of {' or '.join(map(study.title, missing))}{reasons}"


def _growth(headline: Comparison) -> str:
    if headline.growth is None or headline.growth_interval is None:
        return f"Whether this factor holds for larger models is not determined: {headline.remark}."
    low, high = headline.growth_interval
    unchanged = "No change of the factor with model size was found"
    trend = "The factor grows with model size" if low > 1 else "The factor shrinks with model size" if high < 1 else unchanged
    first, last = headline.growth_sizes
    change = f"with ten times the parameters it is multiplied by {headline.growth:.2f} ({low:.2f} to {high:.2f})"
    source = f"computed from {SOURCES[headline.growth_from]}, at the losses that both families reached at each size"
    return f"{trend}: {change}, between N = {first:,} and N = {last:,} ({source})."


def _law_caveats(study: Study, pair: Pair, other_laws: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(
        f"The factor is computed from chinchilla's law, but the runs of the {study.title(family)} are described better by "
        f"{' or '.join(laws)}: compare it with the factor from curves."
        for family, laws in other_laws.items()
        if family in (pair.base, pair.new)
    )


def _caveats(study: Study, noise: TrunkNoise) -> tuple[str, ...]:
    sizes, tokens = study.size_bins, [run.record.tokens for run in study.runs]
    size_range = f"N = {min(sizes):,}" if len(sizes) == 1 else f"N from {min(sizes):,} to {max(sizes):,}"
    token_range = f"{min(tokens):,} to {max(tokens):,} training tokens of {study.source}"
    caveats = [f"The runs cover {size_range} and {token_range}. The answer holds only within this range."]
    if repeating := [run.record.epochs for run in study.runs if run.record.repeats_data]:
        caveats.append(
            f"{len(repeating)} of the {len(study.runs)} runs repeat their data, up to {max(repeating):.3g} epochs; repeated "
            "tokens teach less than new ones, so factors and laws of these runs need not hold for more text."
        )
    if noise.overall is None:
        caveats.append("No size and budget was trained with more than one seed, so the seed noise is unknown.")
    else:
        freedom, by_budget = noise.overall.freedom, noise.by_budget()
        of_freedom = f"{freedom:g} degree{'s' * (freedom != 1)} of freedom"
        ends = [f"{by_budget[d].deviation:.2%} at {d:,} tokens" for d in (min(by_budget), max(by_budget))]
        by_ends = f"; {' and '.join(ends)}" if len(by_budget) > 1 else ""
        caveats.append(
            f"The standard deviation of the loss between seeds is {noise.overall.deviation:.2%} ({of_freedom}){by_ends}."
        )
    if len(set(study.n_settings_tried.values())) > 1:
        tried = ", ".join(f"{study.title(family)} {n}" for family, n in study.n_settings_tried.items())
        unequal = f"The families were tuned with different numbers of settings per size ({tried})"
        caveats.append(f"{unequal}; the best of more settings looks better than it is.")
    if " and " in study.versions:
        caveats.append(f"The runs were made by more than one version of a family or of the training: {study.versions}.")
    return tuple(caveats)
