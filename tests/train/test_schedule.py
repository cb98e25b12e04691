"""Tests of the learning rate schedules and of reduction on plateau."""

import pytest

from lmu_dist.config import TrainConfig
from lmu_dist.train.schedule import learning_rate, phase, plateau_scale


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
