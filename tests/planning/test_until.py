"""The rule by which a ladder stops: what it needs, when it holds, and that it saves cells as simulated."""

import json
from dataclasses import replace

import pytest
import until as benchmark  # benchmarks/until.py

from lmu_dist.config import Config, ConfigError, parse, with_settings
from lmu_dist.planning.cost import plan
from lmu_dist.planning.design import PlannedCell, Question
from lmu_dist.planning.learn import assume
from lmu_dist.planning.until import (
    MIN_FREEDOM,
    Course,
    Target,
    expected_course,
    judge,
    largest_common_size,
    next_wave,
    targets_of,
)
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.run_losses import RunLoss

LAW = Chinchilla(E=1.6, A=14.0, B=55.0, alpha=0.30, beta=0.29)
LAWS = {"transformer": LAW, "lmu": replace(LAW, B=LAW.B * 4**-LAW.beta)}
JOB = parse(
    {
        "ladder": {
            "families": ["lmu", "transformer"],
            "n_params": [1e4, 3e4, 1e5, 3e5],
            "tokens": [1e6, 4e6, 16e6, 64e6],
            "seeds": [0, 1],
            "until": {"factor": 1.3},
        },
        "train": {"schedule": "wsd"},
        "plan": {"efficiency_factor": 4.0},
    }
)
CELLS = [
    PlannedCell(f"{f}{n}{d}{s}", f"{f} {n} {d}", f, n, d, s, f"{f}{n}{s}", d // 1000, d // 1250, 6.0 * n * 1000)
    for f in LAWS
    for n in (3000, 10_000, 30_000, 100_000)
    for d in (10**6, 3 * 10**6, 10**7)
    for s in (0, 1)
]
FACTOR = Question("factor", "lmu", "transformer", n_params=100_000)


def results(cells: list[PlannedCell]) -> list[RunLoss]:
    return [RunLoss(c.family, c.n_params, c.tokens, float(LAWS[c.family].loss(c.n_params, c.tokens)), c.group) for c in cells]


def with_until(**until: float) -> Config:
    return with_settings(JOB, {"ladder.until": until})


def test_target_is_reached_by_its_ratio_and_not_before_the_noise_is_known():
    known = assume(results(CELLS), LAWS, 0.002)
    interval = known.interval(FACTOR)[1]
    assert interval is not None
    ratio = interval[1] / interval[0]
    assert judge(known, [Target(FACTOR, 1.001 * ratio)])[0].reached
    assert not judge(known, [Target(FACTOR, 0.999 * ratio)])[0].reached
    early = judge(replace(known, freedom=MIN_FREEDOM - 1), [Target(FACTOR, 10.0)])[0]
    assert not early.reached
    assert f"{MIN_FREEDOM - 1} degrees of freedom" in early.reason


def test_wave_ends_when_it_is_full_or_when_the_target_is_expected_to_be_reached():
    done, missing = [c for c in CELLS if c.seed == 0], [c for c in CELLS if c.seed == 1]
    known = assume(results(done), LAWS, 0.004)

    def wave(ratio: float, n_slots: int) -> int:
        verdicts = judge(known, [Target(FACTOR, ratio)])
        return len(next_wave(known, verdicts, CELLS, missing, lambda chosen: len(chosen) >= n_slots))

    interval = known.interval(FACTOR)[1]
    assert interval is not None
    assert wave(1.0001, 5) == 5
    assert wave(0.999 * interval[1] / interval[0], 5) == 1


def test_no_cell_fits_into_a_budget_that_is_spent():
    known = assume(results(CELLS[:-6]), LAWS, 0.004)
    verdicts = judge(known, [Target(FACTOR, 1.0001)])
    assert next_wave(known, verdicts, CELLS, CELLS[-6:], lambda _: False, limit=1.0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ladder.families": ["lmu"]}, "the factor compares families with plan.baseline=transformer; the ladder has lmu"),
        ({"ladder.n_params": [1e4, 1e5]}, "a law needs 3 sizes, and the plan has 2 for transformer"),
        ({"ladder.tokens": [1e6]}, "a law needs 3 token budgets, and the plan has 1 for transformer"),
        ({"ladder.n_params": [1e4, 3e4, 1e5], "ladder.tokens": [1e6, 2e6, 4e6], "ladder.seeds": 0}, "needs 10 runs, and .* 9"),
        ({"ladder.until": {"factor": 1.3, "hours": 2}}, "step times are unknown; set plan.flops_per_second"),
    ],
)
def test_a_plan_that_cannot_answer_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        expected_course(with_settings(JOB, changes))


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ({}, "say which interval is to be narrow"),
        ({"factor": 1.0}, "more than 1"),
        ({"alpha": 2, "flops": 1, "hours": 1}, "not both"),
    ],
)
def test_configuration_says_what_until_needs(until: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        with_until(**until)


def test_targets_are_those_of_every_family():
    targets = targets_of(with_until(factor=1.3, alpha=1.5), CELLS)
    assert [str(t.question) for t in targets] == [
        "data-efficiency factor of lmu over transformer at N = 100,000",
        "alpha of transformer",
        "alpha of lmu",
    ]
    assert [t.ratio for t in targets] == [1.3, 1.5, 1.5]
    assert largest_common_size([c for c in CELLS if c.n_params < 30_000 or c.family == "lmu"], "transformer", "lmu") == 10_000


def test_plan_expects_fewer_cells_for_a_wider_interval_and_none_within_a_small_budget():
    wide, narrow = expected_course(with_until(factor=2.5)), expected_course(with_until(factor=1.12))
    assert wide is not None
    assert narrow is not None
    assert wide.reached
    assert wide.n_cells < narrow.n_cells <= 64
    assert 0 < wide.flops_share < narrow.flops_share
    assert "may stop early" in wide.line()
    poor = expected_course(with_until(factor=1.3, flops=1e9))
    assert poor is not None
    assert not poor.reached
    assert expected_course(with_settings(JOB, {"ladder.until": None})) is None


def test_a_budget_of_hours_is_that_of_the_times_of_steps():
    def course(hours: float) -> Course:
        until = {"factor": 1.0001, "hours": hours}
        found = expected_course(with_settings(JOB, {"ladder.until": until, "plan.flops_per_second": 1e12}))
        assert found is not None
        return found

    seconds = plan(with_settings(JOB, {"plan.flops_per_second": 1e12})).worker_seconds
    assert seconds is not None
    assert course(1.01 * seconds / 3600).n_cells == 64
    half = course(0.5 * seconds / 3600)
    assert 0.2 < half.flops_share < 0.6
    assert not half.reached


def test_simulated_ladders_stop_at_a_fraction_of_the_cost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["until.py", "--quick"])
    benchmark.main()
    line = json.loads(capsys.readouterr().out)
    assert line["stopped"] == line["studies"] == 3
    assert line["cost"] < 0.25
    assert line["ratio"] <= line["full_ratio"] ** 1.5
