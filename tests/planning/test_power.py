"""What a grid could tell: wider grids and less noise narrow the intervals; what cannot be told is said."""

import pytest

from lmu_dist.config import Config, parse, with_settings
from lmu_dist.planning.power import power

WIDE = parse(
    {
        "ladder": {
            "families": ["lmu", "transformer"],
            "n_params": [1e4, 1e5, 1e6, 1e7],
            "tokens": [1e7, 1e8, 1e9, 1e10],
        },
    }
)


def width(config: Config, name: str) -> float:
    low, high = power(config).intervals[name]
    return high - low


def test_the_truth_lies_inside_and_noise_widens():
    told = power(WIDE)
    for name, (low, high) in told.intervals.items():
        assert low < told.assumed[name] < high
    assert set(told.intervals) == {"alpha", "beta", "efficiency_factor"}
    noisy = with_settings(WIDE, {"plan.noise": 0.02})
    assert width(noisy, "beta") > 2 * width(WIDE, "beta")


def test_more_seeds_narrow_the_interval():
    assert width(with_settings(WIDE, {"ladder.seeds": [0, 1, 2, 3]}), "beta") < 0.75 * width(WIDE, "beta")


def test_an_efficiency_beyond_the_span_of_budgets_is_not_promised():
    narrow = with_settings(WIDE, {"ladder.tokens": [1e8, 2e8, 5e8]})
    told = power(narrow)
    assert "efficiency_factor" not in told.intervals
    assert any("must span more than that factor" in remark for remark in told.remarks)


def test_a_grid_too_small_for_a_law_says_so():
    told = power(with_settings(WIDE, {"ladder.tokens": [1e8, 2e8], "ladder.n_params": [1e5, 1e6]}))
    assert told.intervals == {}
    assert "cannot determine a law" in told.lines()[0]


def test_the_same_grid_gives_the_same_answer():
    assert power(WIDE) == power(WIDE)
    assert power(WIDE).intervals["alpha"] == pytest.approx(power(WIDE, seed=1).intervals["alpha"], rel=0.2)
