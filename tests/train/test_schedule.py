"""Tests of the learning rate schedules and of reduction on plateau."""

import pytest

from lmu_dist.config import TrainConfig
from lmu_dist.train.schedule import has_same_peaks, learning_rate, phase, plateau_scale


def config(**settings) -> TrainConfig:
    return TrainConfig(**{"tokens": 100_000, "batch_tokens": 1000, "sequence_tokens": 100, "learning_rate": 1.0, **settings})


def test_cosine_schedule():
    train = config(warmup_tokens=10_000)
    assert learning_rate(train, 0) == pytest.approx(0.1)
    assert learning_rate(train, 9) == pytest.approx(1.0)
    assert learning_rate(train, 10) == pytest.approx(1.0)
    assert learning_rate(train, 55) == pytest.approx(0.5)
    assert 0 < learning_rate(train, 99) < 0.001


def test_warmup_stable_decay_schedule():
    train = config(warmup_tokens=10_000, schedule="wsd", decay_share=0.2)
    assert [learning_rate(train, s) for s in (9, 10, 50, 80)] == pytest.approx([1, 1, 1, 1])
    assert learning_rate(train, 90) == pytest.approx(0.5)
    assert learning_rate(train, 99) == pytest.approx(0.05)


def stepped(tokens: int, *earlier: int, **settings) -> TrainConfig:
    settings = {"rate_token_exponent": -0.5, "rate_at_tokens": 10_000, "schedule": "wsd", "warmup_tokens": 2000} | settings
    return config(tokens=tokens, earlier_tokens=earlier, decay_share=0.2, **settings)


def test_peak_is_divided_by_the_root_of_the_budgets_multiple_from_branch_point_to_branch_point():
    train = stepped(160_000, 10_000, 40_000)
    rates = [learning_rate(train, step) for step in range(160)]
    assert rates[0] == 0.5
    assert set(rates[2:8]) == {1.0}  # until 10 steps decay from their step 8 on
    assert set(rates[8:32]) == {0.5}  # 4 times the budget
    assert set(rates[32:129]) == {0.25}
    assert rates[144] == pytest.approx(0.125)
    assert train.peak_rate == 0.25


def test_budgets_of_a_stepped_trunk_share_all_steps_until_the_smaller_one_decays():
    budgets = (10_000, 25_000, 40_000, 160_000)
    trains = [stepped(tokens, *budgets[:i]) for i, tokens in enumerate(budgets)]
    for i, shorter in enumerate(trains):
        for longer in trains[i + 1 :]:
            steps = range(shorter.decay_start)
            assert [learning_rate(longer, s) for s in steps] == [learning_rate(shorter, s) for s in steps]
            assert has_same_peaks(shorter, longer, shorter.decay_start)
            assert learning_rate(longer, shorter.decay_start) < learning_rate(shorter, shorter.decay_start)
            assert not has_same_peaks(shorter, longer, shorter.decay_start + 1)
    without_second = stepped(160_000, 10_000, 40_000)
    assert has_same_peaks(without_second, trains[-1], 8)  # until the smallest budget decays
    assert not has_same_peaks(without_second, trains[-1], 9)


def test_cosine_has_the_rate_of_its_budget_and_an_exponent_of_0_changes_nothing():
    train = stepped(40_000, schedule="cosine")
    assert learning_rate(train, 2) == train.peak_rate == 0.5
    plain = {"rate_token_exponent": 0.0, "rate_at_tokens": None}
    for schedule in ("cosine", "wsd"):
        same, before = stepped(40_000, schedule=schedule, **plain), config(tokens=40_000, schedule=schedule, warmup_tokens=2000)
        assert [learning_rate(same, s) for s in range(40)] == [learning_rate(before, s) for s in range(40)]


@pytest.mark.parametrize(
    ("budgets", "settings", "message"),
    [
        ((40_000,), {"rate_at_tokens": None}, "rate_token_exponent and rate_at_tokens, .* need each other"),
        ((40_000,), {"rate_token_exponent": 0.0}, "rate_token_exponent and rate_at_tokens, .* need each other"),
        ((40_000, 10_000), {"schedule": "cosine"}, "only with schedule: wsd"),
        (
            (40_000, 10_000),
            {"rate_token_exponent": 0.0, "rate_at_tokens": None},
            "only with schedule: wsd and a rate_token_exponent",
        ),
        ((40_000, 40_000), {}, "must ascend and be less than tokens"),
        ((40_000, 20_000, 10_000), {}, "must ascend and be less than tokens"),
        ((40_000, 10_000), {"warmup_tokens": 9000}, "warmup_tokens .* must end before .* after 8000 tokens"),
    ],
)
def test_impossible_steps_of_the_rate_are_refused(budgets: tuple[int, ...], settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        stepped(*budgets, **settings)


def test_plateau_scale_counts_evaluations_without_a_new_best():
    train = config(warmup_tokens=0, plateau_patience=2, plateau_factor=0.5)
    assert plateau_scale(train, [3, 2, 1]) == 1
    assert plateau_scale(train, [1, 2]) == 1
    assert plateau_scale(train, [1, 2, 2]) == 0.5
    assert plateau_scale(train, [1, 2, 2, 2, 2]) == 0.25
    assert plateau_scale(train, [1, 2, 0.5, 2]) == 1
    assert learning_rate(train, 0, [1, 2, 2]) == pytest.approx(0.5)
    assert plateau_scale(config(warmup_tokens=0), [1, 2, 2, 2]) == 1


def test_phase_is_decayed_after_the_last_step():
    train = config(warmup_tokens=0)
    assert (phase(train, 99), phase(train, 100)) == ("undecayed", "decayed")
