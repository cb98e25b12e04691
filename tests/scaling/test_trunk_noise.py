"""Intervals of results from curves count only independent trunks, and the noise of the budgets that a result uses."""

import intervals as benchmark  # benchmarks/intervals.py
import numpy as np
import pytest

from lmu_dist.scaling.curve_factor import factor_with_noise, loss_weights
from lmu_dist.scaling.efficiency import Curve, SeedNoise, factor_from_curves
from lmu_dist.scaling.run_losses import RunLoss
from lmu_dist.scaling.trunk_noise import TrunkNoise, combine, reach


def runs(family: str, errors: dict[int, tuple[float, ...]], n_params: int = 1000) -> list[RunLoss]:
    """Runs whose loss halves with a hundred times the tokens; `errors` of ln L by tokens, one for each seed."""
    return [
        RunLoss(family, n_params, tokens, float(4 * (tokens / 1e6) ** -0.15 * np.exp(error)), f"{family}/{n_params}/{seed}")
        for tokens, of_seeds in errors.items()
        for seed, error in enumerate(of_seeds)
    ]


@pytest.mark.parametrize(
    "design", ["curves of 1 size, all common", "curves of 3 sizes, half common", "noisy smallest budget, half common"]
)
def test_intervals_contain_the_truth_in_nine_studies_of_ten(design: str):
    """200 studies: their share may be three standard errors (0.021) below 0.90, since ten shares are compared."""
    for name, measured in benchmark.measure_curves(design, 200).items():
        assert measured["covered"] > 0.90 - 3 * 0.021, (name, measured)


def test_without_a_second_seed_there_is_no_noise():
    noise = TrunkNoise(runs("base", {10**6: (0.0,), 10**7: (0.0,)}))
    assert (noise.overall, noise.at(10**6, 1000), noise.by_budget()) == (None, None, {})


def test_only_trunks_are_degrees_of_freedom():
    errors = {10**6: (0.01, -0.01), 10**7: (0.01, -0.01), 10**8: (0.01, -0.01)}
    noise = TrunkNoise([*runs("base", errors), *runs("new", errors)])
    total, of_run = noise.of(dict.fromkeys(errors, 1.0), 1000), noise.overall
    assert total is not None
    assert of_run is not None
    assert (of_run.deviation, of_run.freedom) == (pytest.approx(0.01 * np.sqrt(2)), 2)
    assert (total.deviation, total.freedom) == (pytest.approx(0.03 * np.sqrt(2)), 2)  # errors in common add up


def test_noise_is_that_of_the_budgets_that_are_used():
    errors = {10**6: (0.03, -0.03), 10**7: (0.01, -0.01), 10**8: (0.0,)}
    noise = TrunkNoise([*runs("base", errors), *runs("new", errors)])
    found = {tokens: of_budget.deviation for tokens, of_budget in noise.by_budget().items()}
    assert found == {10**6: pytest.approx(0.03 * np.sqrt(2)), 10**7: pytest.approx(0.01 * np.sqrt(2))}
    assert noise.at(10**8, 1000) == noise.at(10**7, 1000)  # no second seed there: that of the nearest smaller budget


def test_a_budget_below_all_repeated_ones_has_the_largest_noise():
    single = (0.0,)
    errors = {10**5: single, 10**6: (0.01, -0.01), 2 * 10**7: single, 3 * 10**7: (0.03, -0.03), 10**8: (0.02, -0.02)}
    noise = TrunkNoise([*runs("base", errors), *runs("new", errors)])
    found = {tokens: of_run.deviation for tokens in errors if (of_run := noise.at(tokens, 1000)) is not None}
    small, most, last = (value * np.sqrt(2) for value in (0.01, 0.03, 0.02))
    # The third is near a larger budget with two seeds, but takes the noise of the smaller one.
    assert list(found) == list(errors)
    assert list(found.values()) == pytest.approx([most, small, small, most, last])
    total = noise.of({10**5: 1.0, 10**8: -1.0}, 1000)
    assert total is not None
    assert (total.deviation, total.freedom) == (pytest.approx(most + last), 2)


def test_errors_of_many_trunks_that_cancel_do_not_count():
    rng = np.random.default_rng(0)
    errors = [{10**6: (float(z), 0.0), 10**7: (float(-z), 0.0)} for z in rng.normal(0, 0.01, 8)]
    noise = TrunkNoise([run for i, of_family in enumerate(errors) for run in runs(str(i), of_family)])
    total = noise.of({10**6: 1.0, 10**7: 1.0}, 1000)
    assert total is not None
    assert (total.deviation, total.freedom) == (pytest.approx(0, abs=1e-12), 8)


def test_budgets_are_the_same_by_tokens_or_by_tokens_per_parameter():
    apart = (0.01, -0.01)
    by_share = [run for n in (1000, 4000, 16_000) for run in runs("base", {n * 5: apart, n * 40: apart}, n)]
    assert [noise.freedom for n in (1000, 16_000) if (noise := TrunkNoise(by_share).at(n * 5, n))] == [3, 3]
    by_tokens = [run for n in (1000, 4000, 16_000) for run in runs("base", {10**6: apart, 10**7: apart}, n)]
    assert [noise.freedom for n in (1000, 16_000) if (noise := TrunkNoise(by_tokens).at(10**6, n))] == [3, 3]


def test_weights_are_the_derivatives_of_the_factor():
    rng, step = np.random.default_rng(1), 1e-7
    curves = [Curve(np.sort(rng.uniform(1e6, 1e8, n)), np.exp(np.sort(rng.uniform(1, 2, n))[::-1])) for n in (5, 4)]
    for which, weights in enumerate(loss_weights(curves[0], curves[1])):
        for i, weight in enumerate(weights):
            logs = []
            for moved_by in (step, -step):
                moved = curves[which].loss.copy()
                moved[i] *= np.exp(moved_by)
                pair = [Curve(c.tokens, moved) if j == which else c for j, c in enumerate(curves)]
                logs.append(np.log(factor_from_curves(pair[0], pair[1]).value or np.nan))
            assert weight == pytest.approx((logs[0] - logs[1]) / (2 * step), rel=1e-4, abs=1e-5)


def test_the_interval_follows_from_the_noise():
    errors = {10**6: (0.01, -0.01), 10**7: (0.01, -0.01), 10**8: (0.01, -0.01)}
    base, new = runs("base", errors), runs("new", errors)
    factor, noise = factor_with_noise(base, new, TrunkNoise([*base, *new]))
    assert noise is not None
    assert factor.interval is not None
    assert np.log(factor.interval[1] / factor.interval[0]) == pytest.approx(2 * reach(noise))
    # By hand: the tokens of a curve change by 1/0.15 of the loss, which is the mean of two seeds; there are two curves.
    assert noise.deviation == pytest.approx(0.01 * np.sqrt(2) / 0.15 / np.sqrt(2) * np.sqrt(2), rel=1e-6)
    assert factor.remark == ""
    curve = Curve(np.array([1e6, 1e7]), np.array([3.0, 2.0]))
    assert factor_from_curves(curve, curve).remark == ""  # curves do not say how many seeds there are
    one_seed = factor_with_noise(base[::2], new[::2], TrunkNoise(base[::2]))
    assert one_seed[0].interval is None
    assert "two seeds" in one_seed[0].remark


def test_noise_of_a_sum_of_independent_errors():
    equal = combine([SeedNoise(3.0, 6), SeedNoise(4.0, 6)])
    assert (equal.deviation, equal.freedom) == (pytest.approx(5), pytest.approx(6))
    unequal = combine([SeedNoise(1.0, 20), SeedNoise(1.0, 2)])
    assert 2 < unequal.freedom < 20
