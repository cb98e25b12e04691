"""Which steps the training curves in MLflow have, and what their points are."""

from dataclasses import replace
from typing import Any

import pytest

from lmu_dist import records
from lmu_dist.config import TrainConfig, parse
from lmu_dist.launch.curves import TrainingCurves
from lmu_dist.records import StepMetrics


def of_steps(n_steps: int, **settings: Any) -> TrainConfig:
    return TrainConfig(tokens=n_steps * 256, batch_tokens=256, sequence_tokens=32, **settings)


def logged(train: TrainConfig, first: int = 0, fork_step: int = 0) -> list[int]:
    """The logged steps of a run that starts, or resumes, at step `first`."""
    return [step for step in range(first, train.n_steps) if train.is_logged(step, fork_step)]


@pytest.mark.parametrize("n_steps", [1, 7, 999, 1000, 1001, 1999, 2000, 2001, 19_000, 19_001, 100_003])
def test_a_curve_has_at_most_some_thousand_points_from_the_first_to_the_last_step(n_steps: int):
    steps = logged(of_steps(n_steps))
    assert min(n_steps, 500) <= len(steps) <= 1002
    assert steps[0] == 0
    assert steps[-1] == n_steps - 1


def test_short_runs_log_every_step():
    assert logged(of_steps(1000)) == list(range(1000))


def test_the_distance_of_points_can_be_set():
    assert logged(of_steps(12, log_every_steps=5)) == [0, 5, 10, 11]
    assert parse({"train": {"log_every_steps": 3}}).train.log_every_steps == 3


def test_a_run_that_resumes_or_branches_off_logs_the_steps_of_its_whole_curve():
    train = of_steps(19_000)
    whole = logged(train)
    for resumed_at in (1, 18, 19, 5000, 18_999):
        assert logged(train, first=resumed_at) == [step for step in whole if step >= resumed_at]
    branch = logged(train, first=5000, fork_step=5000)
    assert branch[0] == 5000
    assert branch[1:] == [step for step in whole if step > 5000]


def step_metrics(step: int, seconds: float) -> StepMetrics:
    return StepMetrics(step, (step + 1) * 256, loss_nats=5 - step / 10, grad_norm=1.0, learning_rate=0.1, step_seconds=seconds)


def test_losses_are_of_the_step_and_speeds_of_all_steps_since_the_last_point():
    train, points = of_steps(10, log_every_steps=4), list[Any]()
    curves = TrainingCurves(lambda *point: points.append(point), train, 0, flops_per_token=2.0, peak_flops_per_second=1e4)
    seconds = [1.0, 1.0, 2.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 4.0]
    for step, each in enumerate(seconds):
        curves.add(step_metrics(step, each))
    curves.log_last()  # the last step is logged already
    assert [step for step, _ in points] == [0, 4, 8, 9]
    for step, point in points:
        expected = step_metrics(step, seconds[step]).values(256, 2.0, 1e4)
        for key in (records.TRAIN_LOSS, records.GRAD_NORM, records.LEARNING_RATE, records.TRAIN_TOKENS):
            assert point[key] == expected[key]
    assert [point[records.TOKENS_PER_SECOND] for _, point in points] == [256, 128, 256, 64]
    assert points[1][1][records.PEAK_SHARE] == 128 * 2.0 / 1e4


def test_the_step_at_which_a_run_diverges_is_logged():
    points = list[Any]()
    curves = TrainingCurves(lambda *point: points.append(point), of_steps(100, log_every_steps=50), 0, 2.0, 1e4)
    curves.log_last()
    for step in range(8):
        curves.add(replace(step_metrics(step, 1.0), loss_nats=float("inf") if step == 7 else 1.0))
    curves.log_last()
    assert [step for step, _ in points] == [0, 7]
