"""Statistical power: larger grids and less noise give narrower intervals; missing intervals have a remark with the reason."""

import pytest

from lmu_dist.config import parse, with_settings
from lmu_dist.planning.power import PowerEstimate, estimate_power

WIDE = parse(
    {
        "ladder": {
            "families": ["lmu", "transformer"],
            "n_params": [1e4, 1e5, 1e6, 1e7],
            "tokens": [1e7, 1e8, 1e9, 1e10],
        },
    }
)


@pytest.fixture(scope="module")
def wide() -> PowerEstimate:
    return estimate_power(WIDE)


def interval_width(estimate: PowerEstimate, name: str) -> float:
    low, high = estimate.intervals[name]
    return high - low


def test_intervals_contain_the_assumed_values_and_widen_with_noise(wide: PowerEstimate):
    for name, (low, high) in wide.intervals.items():
        assert low < wide.assumed[name] < high
    assert set(wide.intervals) == {"alpha", "beta", "efficiency_factor"}
    noisy = estimate_power(with_settings(WIDE, {"plan.noise": 0.02}))
    assert interval_width(noisy, "beta") > 2 * interval_width(wide, "beta")


def test_more_seeds_narrow_the_intervals(wide: PowerEstimate):
    more = estimate_power(with_settings(WIDE, {"ladder.seeds": [0, 1, 2, 3]}))
    assert interval_width(more, "beta") < 0.75 * interval_width(wide, "beta")


def test_no_factor_if_budgets_span_less_than_the_factor():
    narrow = with_settings(WIDE, {"ladder.tokens": [1e8, 2e8, 5e8]})
    estimate = estimate_power(narrow)
    assert "efficiency_factor" not in estimate.intervals
    assert any("must span more than that factor" in remark for remark in estimate.remarks)


def test_remark_if_the_grid_is_too_small_for_a_law():
    estimate = estimate_power(with_settings(WIDE, {"ladder.tokens": [1e8, 2e8], "ladder.n_params": [1e5, 1e6]}))
    assert estimate.intervals == {}
    assert "cannot determine a law" in estimate.lines()[0]


def test_estimate_is_deterministic_and_depends_little_on_the_seed(wide: PowerEstimate):
    assert estimate_power(WIDE) == wide
    assert wide.intervals["alpha"] == pytest.approx(estimate_power(WIDE, seed=1).intervals["alpha"], rel=0.2)
