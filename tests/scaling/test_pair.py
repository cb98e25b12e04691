"""Which two families are compared: defaults, choices, mistakes; factors of several pairs of a study whose truth is known."""

from dataclasses import replace

import pytest
from simulate import TRUTH, make_record

from lmu_dist.config import ConfigError
from lmu_dist.scaling.appearance import stored_appearance
from lmu_dist.scaling.collect import Run, Study, fill_in_colours_and_markers
from lmu_dist.scaling.pair import choose_pair
from lmu_dist.scaling.results import analyse, default_pair

WORTH = {"transformer": 1.0, "lmu": 4.0, "llama": 2.0, "lmu_modern": 3.0}  # of a token
SIZE, BUDGETS = 10_000, (10**6, 4 * 10**6, 16 * 10**6)


def pair_of(families: str, *asked: str | None, planned: str | None = None) -> tuple[str, str]:
    n_runs = dict.fromkeys(families.split(), 6)
    pair = choose_pair(n_runs, *asked, planned=planned)
    return pair.new, pair.base


def test_the_default_pair():
    assert pair_of("lmu lmu_attention transformer lstm llama lmu_modern") == ("lmu", "transformer")
    assert pair_of("lmu llama mamba2 lmu_modern") == ("lmu", "llama")
    assert pair_of("llama mamba2 lmu_modern") == ("lmu_modern", "llama")
    assert pair_of("transformer llama") == ("llama", "transformer")
    assert pair_of("lmu lmu_attention lstm") == ("lmu", "lstm")  # of equally many runs the last one
    most = choose_pair({"lmu": 9, "lmu_attention": 7, "lstm": 6})
    assert (most.new, most.base, most.reason) == ("lmu", "lmu_attention", "by default, because it has most runs")
    assert pair_of("lmu") == ("lmu", "transformer")  # the report names what is missing
    assert pair_of("transformer") == ("lmu", "transformer")


def test_what_is_asked_for_goes_before_the_plan_and_the_plan_before_defaults():
    families = "lmu transformer llama lmu_modern"
    assert pair_of(families, planned="llama") == ("lmu", "llama")
    assert pair_of(families, planned="lmu") == ("lmu_modern", "lmu")
    assert pair_of(families, planned="mamba2") == ("lmu", "transformer")
    assert pair_of(families, "llama", planned="transformer") == ("lmu", "llama")
    assert pair_of(families, "llama", "lmu_modern") == ("lmu_modern", "llama")
    assert pair_of(families, "lmu") == ("lmu_modern", "lmu")
    assert pair_of(families, None, "transformer") == ("transformer", "llama")
    assert pair_of(families, None, "llama", planned="llama") == ("llama", "transformer")


@pytest.mark.parametrize(
    ("families", "asked", "message"),
    [
        ("lmu llama", ("gpt",), "--baseline gpt: there are lmu, llama"),
        ("lmu llama", ("llama", "gpt"), "--family gpt: there are lmu, llama"),
        ("lmu llama", ("llama", "llama"), "--family llama: it is the baseline, too; there are lmu, llama, take two of them"),
        ("lmu", ("lmu",), "--baseline lmu: there are lmu only, so there is nothing to compare it with"),
    ],
)
def test_mistakes_are_one_line(families: str, asked: tuple[str, ...], message: str):
    with pytest.raises(ConfigError) as error:
        pair_of(families, *asked)
    assert str(error.value) == message


@pytest.fixture(scope="module")
def study() -> Study:
    """One size and three budgets of four families; no law can be fitted, so factors come from the curves."""
    runs = list[Run]()
    for family, worth in WORTH.items():
        law = replace(TRUTH, B=TRUTH.B * worth**-TRUTH.beta)
        for tokens in BUDGETS:
            for seed, noise in enumerate((0.999, 1.001)):
                record = make_record(family, SIZE, tokens, seed, float(law.loss(SIZE, tokens)) * noise)
                runs.append(Run(record.key, record.key, SIZE, record))
    looks = {family: stored_appearance(family, None) for family in WORTH}
    return Study("e", "text", tuple(runs), (), {}, fill_in_colours_and_markers(looks))


@pytest.mark.parametrize(("baseline", "family", "factor"), [("llama", "lmu_modern", 1.5), ("llama", "transformer", 0.5)])
def test_a_chosen_pair_is_judged_by_a_factor_of_one(study: Study, baseline: str, family: str, factor: float):
    results = analyse(study, {}, 60, default_pair(study, baseline, family))
    assert results.answer.factor is not None
    assert results.answer.factor.value == pytest.approx(factor, rel=0.03)  # curves are straight between budgets
    verdict = "More data-efficient" if factor > 1 else "Less data-efficient"
    assert results.answer.verdict.startswith(f"{verdict}: {results.answer.factor.value:.3g} times (")
    assert f"the {study.title(baseline)} needs" in results.answer.sentence
    assert {(c.new, c.base) for c in results.comparisons} == {(name, "llama") for name in WORTH if name != "llama"}


def test_controlled_comparisons_have_a_factor_or_the_reason_why_not(study: Study):
    found = {(c.new, c.base): c for c in analyse(study, {}, 60).controlled}
    for (new, base), controlled in found.items():
        assert controlled.factor is not None
        assert controlled.factor.interval is not None
        low, high = controlled.factor.interval
        assert low < WORTH[new] / WORTH[base] < high
        assert (controlled.n_params, controlled.source, controlled.reason) == (SIZE, "curves", "")
    assert list(found) == [("lmu", "transformer"), ("lmu", "llama"), ("lmu_modern", "llama")]
    first_seed = [run for run in study.runs if run.record.family != "lmu_modern" and run.record.seed == 0]
    some = {(c.new, c.base): c for c in analyse(replace(study, runs=tuple(first_seed)), {}, 60).controlled}
    assert some["lmu_modern", "llama"].factor is None
    assert "the study has no finished, comparable run of" in some["lmu_modern", "llama"].reason
    assert some["lmu", "llama"].reason == "no size and budget was trained with two seeds"
