"""The question and its answer in words: a comparison in, what a reader takes home out. No more is said than intervals allow."""

from dataclasses import dataclass

from lmu_dist.scaling.collect import Study, title
from lmu_dist.scaling.compare import Comparison
from lmu_dist.scaling.efficiency import Factor, SeedNoise

CLAIM = 10.0  # times the tokens, as the paper has it
BASE, NEW, WORST = "transformer", "lmu", "lstm"
UNKNOWN = "Not determined"


@dataclass(frozen=True)
class Answer:
    """What a reader takes home: a word, a sentence, and what it rests on. `factor` may be unknown."""

    verdict: str
    sentence: str
    n_params: int | None
    factor: Factor | None
    source: str  # laws | curves | none
    growth: str
    caveats: tuple[str, ...]


def answer(study: Study, asked: Comparison | None, noise: SeedNoise | None) -> Answer:
    """From the comparison of the two families asked about, if the study has it."""
    caveats = _caveats(study, noise)
    if asked is None or not asked.sizes:
        missing = [title(name) for name in (NEW, BASE) if name not in study.families]
        why = f"no finished run of {' or '.join(missing)}" if missing else "they have no size in common"
        return Answer(UNKNOWN, f"The study cannot say: {why}.", None, None, "none", "", caveats)
    n, factor, source = _headline(asked)
    if factor is None:
        last = asked.sizes[-1]
        sense, limit = last.curves.bound or ("", 0.0)
        known = f"{'more' if sense == '>' else 'less'} than {_round(limit)}"
        told = f"At N = {last.n_params:,} the factor is {known}: {last.curves.remark}."
        return Answer(UNKNOWN, told, last.n_params, last.curves, "curves", _growth(asked), caveats)
    assert factor.value is not None
    times = (
        f"At N = {n:,} the {title(BASE)} needs {_round(factor.value)} times the tokens of the {title(NEW)} for the same loss"
    )
    if factor.interval is None:
        said = f"{times}, as far as one can see; without an interval, since {factor.remark}, that decides nothing."
        return Answer(UNKNOWN, said, n, factor, source, _growth(asked), caveats)
    low, high = factor.interval
    sense = "More than ten" if low > CLAIM else "Less than ten" if high < CLAIM else "Ten is possible"
    verdict = f"{sense}: {_round(factor.value)} times ({_round(low)} to {_round(high)})"
    fewer = " That it needs fewer is as possible as that it needs more." if low < 1 < high else ""
    said = f"{times}; the 90 % interval is from {source}.{fewer}"
    return Answer(verdict, said, n, factor, source, _growth(asked), caveats)


def _headline(asked: Comparison) -> tuple[int, Factor | None, str]:
    """The best-founded factor of the largest size: of laws if they have an interval, else of curves, else none."""
    for pick, source in ((lambda s: s.laws, "laws"), (lambda s: s.curves, "curves")):
        for need_interval in (True, False):
            for size in reversed(asked.sizes):
                factor = pick(size)
                good = factor.interval is not None if need_interval else source == "curves"
                if factor.known and good:
                    return size.n_params, factor, source
    return asked.sizes[-1].n_params, None, "none"


def _growth(asked: Comparison) -> str:
    if asked.growth is None or asked.growth_interval is None:
        return f"Whether it holds as models grow is not determined: {asked.remark}."
    low, high = asked.growth_interval
    sense = "It grows with the model" if low > 1 else "It shrinks as models grow" if high < 1 else "No change with size is seen"
    first, last = asked.sizes[0].n_params, asked.sizes[-1].n_params
    times = f"tenfold N multiplies the factor by {asked.growth:.2f} ({low:.2f} to {high:.2f})"
    return f"{sense}: {times}, between N = {first:,} and {last:,}, from {asked.growth_from}."


def _caveats(study: Study, noise: SeedNoise | None) -> tuple[str, ...]:
    sizes, tokens = study.rungs, [run.record.tokens for run in study.runs]
    budgets = f"{min(tokens):,} to {max(tokens):,} tokens of {study.source}"
    seen = f"Seen: N from {sizes[0]:,} to {sizes[-1]:,}, {budgets}. Nothing is said beyond."
    if noise is None:
        return seen, "One seed: seed noise is unknown."
    return seen, f"Another seed changes a loss by {noise.deviation:.2%} ({noise.freedom} degrees of freedom)."


def _round(value: float) -> str:
    """Two digits or so, for sentences."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"
