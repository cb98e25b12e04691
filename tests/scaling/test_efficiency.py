"""Data-efficiency factors, parabolas and plateaus: correct for known laws, and None with a remark where undetermined."""

from dataclasses import replace

import numpy as np
import pytest

from lmu_dist.scaling.curve_factor import factor_with_noise
from lmu_dist.scaling.efficiency import (
    factor_from_curves,
    factor_from_laws,
    improvement_ratio,
    lower_envelope,
)
from lmu_dist.scaling.fit import fit
from lmu_dist.scaling.intervals import bootstrap_weights
from lmu_dist.scaling.isoflop import fit_parabolas, optimal_size_power_law
from lmu_dist.scaling.laws import Chinchilla
from lmu_dist.scaling.positions import bin_positions, factors_by_position, find_plateau
from lmu_dist.scaling.published import HOFFMANN, PAPER
from lmu_dist.scaling.run_losses import RunLoss
from lmu_dist.scaling.sizes import fit_power_law
from lmu_dist.scaling.table import rows_from_columns
from lmu_dist.scaling.trunk_noise import TrunkNoise
from lmu_dist.scaling.validate import fit_and_validate

TOKENS = np.logspace(6, 9, 10)
NOISE = np.exp(np.random.default_rng(5).normal(0, 0.01, 10))


def test_a_tenth_of_the_tokens_is_a_factor_of_ten():
    loss = HOFFMANN.loss(1e8, TOKENS) * NOISE
    factor = factor_from_curves(lower_envelope(TOKENS, loss), lower_envelope(TOKENS / 10, loss))
    assert (factor.value, factor.ends) == (pytest.approx(10), (pytest.approx(10), pytest.approx(10)))
    n, d = (v.ravel() for v in np.meshgrid(np.logspace(6, 9, 5), TOKENS))
    noisy = HOFFMANN.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.01, len(n)))
    base, new = (fit(Chinchilla, rows_from_columns(n, d / times, noisy)).law for times in (1, 10))
    fitted = factor_from_laws(base, new, 1e7, ((1e6, 1e9), (1e5, 1e8)))  # pyright: ignore
    assert fitted.value == pytest.approx(10, rel=1e-4)
    assert fitted.ends == (pytest.approx(10, rel=1e-4), pytest.approx(10, rel=1e-4))


def test_factor_against_itself_is_one_and_swapping_inverts_it():
    one, two = (
        lower_envelope(TOKENS, HOFFMANN.loss(1e8, TOKENS) * NOISE),
        lower_envelope(TOKENS, HOFFMANN.loss(3e8, TOKENS) / NOISE),
    )
    assert factor_from_curves(one, one).value == pytest.approx(1)
    forward, backward = factor_from_curves(one, two), factor_from_curves(two, one)
    assert forward.value is not None
    assert forward.value * (backward.value or 0) == pytest.approx(1)
    assert forward.ends is not None
    assert forward.ends[0] * (backward.ends or (0,))[0] == pytest.approx(1)


def test_intervals_from_laws_contain_the_true_factor():
    n, d = (v.ravel() for v in np.meshgrid(np.logspace(6, 9, 6), np.logspace(8, 11, 6)))
    better = replace(HOFFMANN, B=HOFFMANN.B * 3**-HOFFMANN.beta)
    rng, labels = np.random.default_rng(3), [str(i) for i in range(36)]
    tables = [
        rows_from_columns(n, d, law.loss(n, d) * np.exp(rng.normal(0, 0.005, 36))) for law in (HOFFMANN, better, HOFFMANN)
    ]
    base, new, same_law = (fit_and_validate(Chinchilla, table, labels, 200) for table in tables)
    for other, truth in ((new, 3), (same_law, 1)):
        pairs = list(zip(base.laws, other.laws, strict=True))
        found = factor_from_laws(base.law, other.law, 1e8, ((1e8, 1e11), (1e8, 1e11)), pairs, base.correction)  # pyright: ignore
        assert found.interval is not None
        assert found.interval[0] < truth < found.interval[1] < 1.2 * truth


def test_there_is_no_extrapolation_beyond_common_losses():
    slow, fast = lower_envelope([1e6, 1e7], [5.0, 4.0]), lower_envelope([1e6, 1e7], [3.9, 3.0])
    forward, backward = factor_from_curves(slow, fast), factor_from_curves(fast, slow)
    assert not forward.known
    assert forward.bound == (">", 10)  # the base has not reached after 1e7 tokens what the other has after 1e6
    assert not backward.known
    assert backward.bound == ("<", 0.1)
    assert "train the base on more tokens" in forward.remark
    touching = factor_from_curves(slow, lower_envelope([1e6, 1e7], [4.0, 3.0]))
    assert (touching.value, touching.interval, touching.bound) == (pytest.approx(10), None, None)
    assert "only one loss" in touching.remark
    assert np.isnan(slow.tokens_for([5.01, 3.99])).all()
    laws = HOFFMANN, replace(HOFFMANN, B=HOFFMANN.B * 50**-HOFFMANN.beta)
    assert not factor_from_laws(*laws, 1e8, ((1e9, 1e10), (1e9, 1e10))).known
    assert factor_from_laws(*laws, 1e8, ((1e9, 1e11), (1e9, 1e11))).value == pytest.approx(50)


def test_lower_envelope_averages_seeds_and_falls_strictly():
    found = lower_envelope([1e6, 1e6, 2e6, 3e6, 4e6], [4.0, 4.41, 4.3, 3.9, 3.9])
    assert list(found.tokens) == [1e6, 3e6]
    assert found.loss == pytest.approx([4.2, 3.9], rel=1e-3)


def test_improvement_ratio():
    rng = np.random.default_rng(0)
    worst = 5 + 0.1 * rng.random(20)
    losses = np.stack([worst - 0.5, worst - 0.3, worst], axis=1) + rng.normal(0, 0.005, (20, 3))
    bootstrap = bootstrap_weights([str(i) for i in range(20)], 500)
    found = improvement_ratio(losses, bootstrap)
    assert found.value == pytest.approx(2 / 3, rel=0.05)
    assert found.interval is not None
    assert found.interval[0] < 2 / 3 < found.interval[1]
    level = losses[:, [0, 2, 2]] + np.where(np.arange(20) % 2, 0.01, -0.01)[:, None] * [0, 1, 0]
    assert "is not clearly better" in improvement_ratio(level, bootstrap).remark
    assert "is worse" in improvement_ratio(losses[:, [0, 2, 1]], bootstrap).remark
    assert improvement_ratio(losses[:3], bootstrap[:, :3]).value is None
    of_one_trunk = improvement_ratio(losses, np.repeat(bootstrap[:, :1], len(losses), axis=1))
    assert (of_one_trunk.value, of_one_trunk.gain_intervals) == (None, None)
    assert "one size and seed" in of_one_trunk.remark
    assert found.gain_intervals is not None
    assert found.gain_intervals[0][0] < 0.2 < found.gain_intervals[0][1]
    assert improvement_ratio(np.empty((0, 3))).remark.startswith("the three families have no size")


def test_parabolas_find_the_optimal_size_or_give_a_reason():
    law, k = Chinchilla(1.7, 400.0, 400.0, 0.3, 0.3), 6
    compute = np.repeat(np.logspace(18, 21, 4), 7)
    sizes = np.concatenate([law.optimum(c)[0] * np.geomspace(0.2, 5, 7) for c in np.logspace(18, 21, 4)])
    rows = rows_from_columns(sizes, compute / (k * sizes), law.loss(sizes, compute / (k * sizes)))
    found = fit_parabolas(rows, compute)
    assert [p.reason for p in found] == [""] * 4
    assert [p.n_params for p in found] == pytest.approx([float(law.optimum(c)[0]) for c in np.logspace(18, 21, 4)], rel=0.15)
    through = optimal_size_power_law(found)
    assert through is not None
    assert through[1] == pytest.approx(0.5, abs=1e-6)  # the exponent is unbiased although the size is biased
    assert found[0].loss(np.array([found[0].n_params]))[0] <= min(found[0].losses) + 1e-3
    low, high = float(law.optimum(1e18)[0]), compute < 2e18
    few = high & (sizes < low)
    assert [p.reason for p in fit_parabolas(rows.where(few), compute[few])] == ["3 sizes; a parabola needs 4"]
    falling = rows_from_columns(sizes[high], rows.tokens[high], 3 + np.square(np.log(sizes[high] / low / 20)))
    assert [p.reason for p in fit_parabolas(falling, compute[high])] == ["the minimum lies outside the sizes trained"]
    arched = rows_from_columns(sizes[high], rows.tokens[high], 9 - rows.loss[high])
    assert fit_parabolas(arched, compute[high])[0].reason.startswith("the parabola does not open upwards")
    assert optimal_size_power_law(found[:2]) is None


def test_find_plateau_of_loss_by_position():
    rng = np.random.default_rng(0)
    t = np.arange(1, 1025)
    level = 3 + 2 * np.minimum(t, 100) ** -0.5
    found = find_plateau(bin_positions(level + rng.normal(0, 0.01, 1024)))
    assert found.determined
    assert found.position == pytest.approx(100, rel=0.45)
    falling = find_plateau(bin_positions(6 - 0.3 * np.log(t) + rng.normal(0, 0.01, 1024)))
    assert (falling.position, falling.determined) == (None, True)
    noisy = find_plateau(bin_positions(level + rng.normal(0, 1, 1024)))
    assert not noisy.determined
    assert noisy.resolution > 0.02
    bins = bin_positions(level)
    assert (bins.first[0], bins.last[-1]) == (1, 1024)
    assert [last + 1 for last in bins.last[:-1]] == list(bins.first[1:])


def test_factors_by_position():
    t = np.arange(1, 257)

    def runs(family: str, token_worth: float) -> list[tuple[RunLoss, np.ndarray]]:
        """Three budgets and two seeds, whose losses differ by 0.2 %."""
        found = []
        for tokens in (10**6, 10**7, 10**8):
            for seed, error in enumerate((0.999, 1.001)):
                losses = (3 + (tokens * token_worth) ** -0.3 * 100 + 2 * t**-0.5) * error
                found.append((RunLoss(family, 1000, tokens, float(losses.mean()), f"{family}/{seed}"), losses))
        return found

    base, new = runs("base", 1), runs("new", 5)
    noise = TrunkNoise([run for run, _ in (*base, *new)])
    found = factors_by_position(base, new, noise)
    assert found[0][0] > 1  # a bin of one position has no error estimate, so it is left out
    for first, last, factor in found:
        assert factor.value == pytest.approx(5, rel=0.15)  # straight lines between three budgets are only approximate
        of_bin = [[replace(r, loss=float(y[first - 1 : last].mean())) for r, y in runs] for runs in (base, new)]
        without_errors, _ = factor_with_noise(of_bin[0], of_bin[1], noise)
        assert factor.interval is not None
        assert without_errors.interval is not None
        assert factor.interval[0] < without_errors.interval[0] < factor.value < without_errors.interval[1] < factor.interval[1]


def test_an_exact_power_law_seldom_bends():
    """The test is one at 1 %; at 10 %, as before, one family in ten was said to follow no power law."""
    sizes, rng = np.geomspace(1e4, 1e6, 5), np.random.default_rng(0)
    noise = np.exp(rng.normal(0, 0.004, (1000, 5)))
    share = np.mean([bool(fit_power_law("lmu", 1, sizes, PAPER["lmu"].loss(sizes) * of_study).bends) for of_study in noise])
    assert 0.004 < share < 0.02


def test_fit_power_law_in_size():
    sizes = np.logspace(3, 6, 6)
    noise = np.exp(np.random.default_rng(1).normal(0, 0.003, 6))
    found = fit_power_law("lmu", 10**6, sizes, PAPER["lmu"].loss(sizes) * noise)
    assert found.law is not None
    assert found.interval is not None
    assert found.interval[0] < 0.072 < found.interval[1]
    assert found.law.scale == pytest.approx(1.95e14, rel=3)
    assert (found.bends, found.worst_residual) == (False, pytest.approx(0.005, abs=0.005))
    assert fit_power_law("lmu", 10**6, sizes, 8 + PAPER["lmu"].loss(sizes / 1e3) * noise).bends
    assert fit_power_law("lmu", 10**6, sizes[:3], sizes[:3]).remark.startswith("3 sizes")
