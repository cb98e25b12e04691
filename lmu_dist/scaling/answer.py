"""The question and its answer in words: a comparison in, what a reader takes home out. No more is said than intervals allow."""

from collections import Counter
from dataclasses import dataclass

from lmu_dist.scaling.collect import Study, title
from lmu_dist.scaling.compare import AtSize, Comparison
from lmu_dist.scaling.efficiency import Factor, SeedNoise

CLAIM = 10.0  # times the tokens, as the paper has it
BASE, NEW, WORST = "transformer", "lmu", "lstm"
UNKNOWN = "Not determined"


@dataclass(frozen=True)
class Answer:
    """What a reader takes home: a word, a sentence, and what it rests on, which is what is known at the largest size.

    `others` says where smaller sizes have another answer. `factor` may be unknown.
    """

    verdict: str
    sentence: str
    others: str
    n_params: int | None
    factor: Factor | None
    source: str  # laws | curves | none
    growth: str
    caveats: tuple[str, ...]


def answer(study: Study, asked: Comparison | None, noise: SeedNoise | None) -> Answer:
    """From the comparison of the two families asked about, if the study has it."""
    caveats = _caveats(study, noise)
    if asked is None or not asked.sizes:
        return Answer(UNKNOWN, f"The study cannot say: {_lacking(study)}.", "", None, None, "none", "", caveats)
    largest = asked.sizes[-1]
    factor, source = known_best(largest)
    sense = _sense(factor)
    verdict = f"{sense}: {_told(factor)}" if factor.interval else sense
    times = f"the {title(BASE)} needs {_told(factor)} the tokens of the {title(NEW)} for the same loss"
    if factor.interval is not None:
        either = factor.interval[0] < 1 < factor.interval[1]
        fewer = " That it needs fewer is as possible as that it needs more." if either else ""
        said = f"At N = {largest.n_params:,} {times}; from {source}, with its 90 % interval.{fewer}"
    elif factor.value is not None:
        why = f"Without an interval, since {factor.remark}, that decides nothing."
        said = f"At N = {largest.n_params:,} {times}, as far as one can see. {why}"
    else:
        said = f"At N = {largest.n_params:,} it would be {_told(factor)}, with an unknown error: {factor.remark}."
    differing = [size for size in asked.sizes[:-1] if _sense(known_best(size)[0]) not in (sense, UNKNOWN)]
    others = [
        f"At N = {size.n_params:,}: {_sense(known_best(size)[0]).lower()}, {_told(known_best(size)[0])}." for size in differing
    ]
    return Answer(verdict, said, " ".join(others), largest.n_params, factor, source, _growth(asked), caveats)


def known_best(size: AtSize) -> tuple[Factor, str]:
    """What is known best at a size: the factor of laws if it has an interval, else that of curves."""
    return (size.laws, "laws") if size.laws.interval is not None else (size.curves, "curves")


def _sense(factor: Factor) -> str:
    if factor.interval is None:
        return UNKNOWN
    low, high = factor.interval
    return "More than ten" if low > CLAIM else "Less than ten" if high < CLAIM else "Ten is possible"


def _told(factor: Factor) -> str:
    if factor.value is None:
        assert factor.bound is not None
        return f"{'more' if factor.bound[0] == '>' else 'less'} than {factor.bound[1]:.3g} times"
    ends = f" ({factor.interval[0]:.3g} to {factor.interval[1]:.3g})" if factor.interval else ""
    return f"{factor.value:.3g} times{ends}"


def _lacking(study: Study) -> str:
    missing = [name for name in (NEW, BASE) if name not in study.families]
    if not missing:
        return f"{title(NEW)} and {title(BASE)} have no size in common"
    out = Counter(o.reason.split(":")[0] for o in study.left_out if o.record and o.record.family in missing)
    reasons = "; left out: " + ", ".join(f"{n} {reason}" for reason, n in out.items()) if out else ""
    return f"there is no finished run of {' or '.join(map(title, missing))} that may be compared{reasons}"


def _growth(asked: Comparison) -> str:
    if asked.growth is None or asked.growth_interval is None:
        return f"Whether it holds as models grow is not determined: {asked.remark}."
    low, high = asked.growth_interval
    sense = "It grows with the model" if low > 1 else "It shrinks as models grow" if high < 1 else "No change with size is seen"
    first, last = asked.growth_sizes
    times = f"tenfold N multiplies the factor by {asked.growth:.2f} ({low:.2f} to {high:.2f})"
    where = f"between N = {first:,} and {last:,}, from {asked.growth_from}, at the losses seen at each size"
    return f"{sense}: {times}, {where}."


def _caveats(study: Study, noise: SeedNoise | None) -> tuple[str, ...]:
    sizes, tokens = study.rungs, [run.record.tokens for run in study.runs]
    span = f"N = {min(sizes):,}" if len(sizes) == 1 else f"N from {min(sizes):,} to {max(sizes):,}"
    told = [f"Seen: {span}, {min(tokens):,} to {max(tokens):,} tokens of {study.source}. Nothing is said beyond."]
    if noise is None:
        told.append("No cell was run with two seeds, so seed noise is unknown.")
    else:
        told.append(f"Another seed changes a loss by {noise.deviation:.2%} ({noise.freedom} degrees of freedom).")
    if len(set(study.tries.values())) > 1:
        tried = ", ".join(f"{title(family)} {n}" for family, n in study.tries.items())
        told.append(f"Rates tried at one size differ ({tried}), and the best of more tries looks better than it is.")
    if len({run.record.code_digest for run in study.runs}) > 1:
        told.append("Runs were made by different versions of the training code.")
    return tuple(told)
