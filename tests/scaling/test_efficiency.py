"""The factor and its relatives: exact where the truth is known, silent where nothing was seen."""

from dataclasses import replace

import numpy as np
import pytest

from lmu_dist.scaling.efficiency import SeedNoise, curve, from_curves, from_laws, improvement, seed_noise
from lmu_dist.scaling.examine import examine
from lmu_dist.scaling.fit import fit
from lmu_dist.scaling.intervals import weights
from lmu_dist.scaling.isoflop import frontier, parabolas
from lmu_dist.scaling.laws import HOFFMANN, PAPER, Chinchilla
from lmu_dist.scaling.positions import binned, factors, level_from
from lmu_dist.scaling.sizes import power_law
from lmu_dist.scaling.table import rows_of

TOKENS = np.logspace(6, 9, 10)
NOISE = np.exp(np.random.default_rng(5).normal(0, 0.01, 10))


def test_a_tenth_of_the_tokens_is_a_factor_of_ten():
    loss = HOFFMANN.loss(1e8, TOKENS) * NOISE
    factor = from_curves(curve(TOKENS, loss), curve(TOKENS / 10, loss))
    assert (factor.value, factor.ends) == (pytest.approx(10), (pytest.approx(10), pytest.approx(10)))
    n, d = (v.ravel() for v in np.meshgrid(np.logspace(6, 9, 5), TOKENS))
    noisy = HOFFMANN.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.01, len(n)))
    base, new = (fit(Chinchilla, rows_of(n, d / times, noisy)).law for times in (1, 10))
    fitted = from_laws(base, new, 1e7, ((1e6, 1e9), (1e5, 1e8)))  # pyright: ignore
    assert fitted.value == pytest.approx(10, rel=1e-4)
    assert fitted.ends == (pytest.approx(10, rel=1e-4), pytest.approx(10, rel=1e-4))


def test_a_family_against_itself_and_the_other_way_round():
    one, two = curve(TOKENS, HOFFMANN.loss(1e8, TOKENS) * NOISE), curve(TOKENS, HOFFMANN.loss(3e8, TOKENS) / NOISE)
    same = from_curves(one, one, SeedNoise(0.01, 10))
    assert same.value == pytest.approx(1)
    assert same.interval is not None
    assert same.interval[0] < 1 < same.interval[1]
    there, back = from_curves(one, two), from_curves(two, one)
    assert there.value is not None
    assert there.value * (back.value or 0) == pytest.approx(1)
    assert there.ends is not None
    assert there.ends[0] * (back.ends or (0,))[0] == pytest.approx(1)


def test_intervals_from_laws_hold_the_truth_and_one_for_a_family_against_itself():
    n, d = (v.ravel() for v in np.meshgrid(np.logspace(6, 9, 6), np.logspace(8, 11, 6)))
    better = replace(HOFFMANN, B=HOFFMANN.B * 3**-HOFFMANN.beta)
    rng, labels = np.random.default_rng(3), [str(i) for i in range(36)]
    tables = [rows_of(n, d, law.loss(n, d) * np.exp(rng.normal(0, 0.005, 36))) for law in (HOFFMANN, better, HOFFMANN)]
    base, new, again = (examine(Chinchilla, table, labels, 200) for table in tables)
    for other, truth in ((new, 3), (again, 1)):
        pairs = list(zip(base.laws, other.laws, strict=True))
        found = from_laws(base.law, other.law, 1e8, ((1e8, 1e11), (1e8, 1e11)), pairs, base.widen)  # pyright: ignore
        assert found.interval is not None
        assert found.interval[0] < truth < found.interval[1] < 1.2 * truth


def test_nothing_is_said_beyond_what_was_seen():
    slow, fast = curve([1e6, 1e7], [5.0, 4.0]), curve([1e6, 1e7], [3.9, 3.0])
    there, back = from_curves(slow, fast), from_curves(fast, slow)
    assert not there.known
    assert there.bound == (">", 10)  # 1e7 were not enough for what the other has after 1e6
    assert not back.known
    assert back.bound == ("<", 0.1)
    assert "would tell" in there.remark
    touching = from_curves(slow, curve([1e6, 1e7], [4.0, 3.0]), SeedNoise(0.01, 9))
    assert (touching.value, touching.interval, touching.bound) == (pytest.approx(10), None, None)
    assert "only one loss" in touching.remark
    assert np.isnan(slow.tokens_for([5.01, 3.99])).all()
    laws = HOFFMANN, replace(HOFFMANN, B=HOFFMANN.B * 50**-HOFFMANN.beta)
    assert not from_laws(*laws, 1e8, ((1e9, 1e10), (1e9, 1e10))).known
    assert from_laws(*laws, 1e8, ((1e9, 1e11), (1e9, 1e11))).value == pytest.approx(50)


def test_curves_average_seeds_and_only_fall():
    found = curve([1e6, 1e6, 2e6, 3e6, 4e6], [4.0, 4.41, 4.3, 3.9, 3.9])
    assert list(found.tokens) == [1e6, 3e6]
    assert found.loss == pytest.approx([4.2, 3.9], rel=1e-3)


def test_seed_noise_is_pooled_over_what_differs_in_the_seed_only():
    assert seed_noise([[3.0], [4.0]]) is None
    found = seed_noise([[3.0, 3.0 * np.exp(0.02)], [4.0], [5.0, 5.0 * np.exp(0.02)]])
    assert found is not None
    assert (found.deviation, found.freedom) == (pytest.approx(0.02 / np.sqrt(2)), 2)
    rng = np.random.default_rng(0)
    wide = seed_noise([list(4 * np.exp(rng.normal(0, 0.01, 2))) for _ in range(300)])
    assert wide is not None
    assert wide.deviation == pytest.approx(0.01, rel=0.1)


def test_noise_of_a_seed_makes_the_interval():
    one, two = curve([1e6, 1e7], [4.0, 3.0]), curve([1e6, 1e7], [3.8, 2.9])
    narrow, wide = (from_curves(one, two, SeedNoise(sd, 20)) for sd in (0.001, 0.01))
    assert narrow.interval is not None
    assert wide.interval is not None
    assert np.log(wide.interval[1] / wide.interval[0]) == pytest.approx(10 * np.log(narrow.interval[1] / narrow.interval[0]))
    assert from_curves(one, two).interval is None


def test_the_ratio_of_improvements():
    rng = np.random.default_rng(0)
    worst = 5 + 0.1 * rng.random(20)
    losses = np.stack([worst - 0.5, worst - 0.3, worst], axis=1) + rng.normal(0, 0.005, (20, 3))
    drawn = weights([str(i) for i in range(20)], 500)
    found = improvement(losses, drawn)
    assert found.value == pytest.approx(2 / 3, rel=0.05)
    assert found.interval is not None
    assert found.interval[0] < 2 / 3 < found.interval[1]
    level = losses[:, [0, 2, 2]] + np.where(np.arange(20) % 2, 0.01, -0.01)[:, None] * [0, 1, 0]
    assert "cannot be told" in improvement(level, drawn).remark
    assert "no better" in improvement(losses[:, [0, 2, 1]], drawn).remark
    assert improvement(losses[:3], drawn[:, :3]).value is None
    assert found.gain_intervals is not None
    assert found.gain_intervals[0][0] < 0.2 < found.gain_intervals[0][1]
    assert improvement(np.empty((0, 3))).remark.startswith("no size")


def test_parabolas_find_the_size_and_know_when_not():
    law, k = Chinchilla(1.7, 400.0, 400.0, 0.3, 0.3), 6
    compute = np.repeat(np.logspace(18, 21, 4), 7)
    sizes = np.concatenate([law.optimum(c)[0] * np.geomspace(0.2, 5, 7) for c in np.logspace(18, 21, 4)])
    rows = rows_of(sizes, compute / (k * sizes), law.loss(sizes, compute / (k * sizes)))
    found = parabolas(rows, compute)
    assert [p.reason for p in found] == [""] * 4
    assert [p.n_params for p in found] == pytest.approx([float(law.optimum(c)[0]) for c in np.logspace(18, 21, 4)], rel=0.15)
    through = frontier(found)
    assert through is not None
    assert through[1] == pytest.approx(0.5, abs=1e-6)  # the exponent is right though the size is biased
    assert found[0].loss(np.array([found[0].n_params]))[0] <= min(found[0].losses) + 1e-3
    low, high = float(law.optimum(1e18)[0]), compute < 2e18
    few = high & (sizes < low)
    assert [p.reason for p in parabolas(rows.where(few), compute[few])] == ["3 sizes; a parabola needs 4"]
    falling = rows_of(sizes[high], rows.tokens[high], 3 + np.square(np.log(sizes[high] / low / 20)))
    assert [p.reason for p in parabolas(falling, compute[high])] == ["the least loss is outside the sizes tried"]
    arched = rows_of(sizes[high], rows.tokens[high], 9 - rows.loss[high])
    assert parabolas(arched, compute[high])[0].reason.startswith("not curved upwards")
    assert frontier(found[:2]) is None


def test_where_a_loss_by_position_is_level():
    rng = np.random.default_rng(0)
    t = np.arange(1, 1025)
    level = 3 + 2 * np.minimum(t, 100) ** -0.5
    found = level_from(binned(level + rng.normal(0, 0.01, 1024)))
    assert found.determined
    assert found.position == pytest.approx(100, rel=0.45)
    falling = level_from(binned(6 - 0.3 * np.log(t) + rng.normal(0, 0.01, 1024)))
    assert (falling.position, falling.determined) == (None, True)
    noisy = level_from(binned(level + rng.normal(0, 1, 1024)))
    assert not noisy.determined
    assert noisy.resolution > 0.02
    bins = binned(level)
    assert (bins.first[0], bins.last[-1]) == (1, 1024)
    assert [last + 1 for last in bins.last[:-1]] == list(bins.first[1:])


def test_the_factor_by_position():
    t = np.arange(1, 257)

    def at(tokens: float, worth: float) -> list[np.ndarray]:
        return [3 + (tokens * worth) ** -0.3 * 100 + 2 * t**-0.5 for _ in range(2)]

    budgets = (10**6, 10**7, 10**8)
    found = factors({d: at(d, 1) for d in budgets}, {d: at(d, 5) for d in budgets}, SeedNoise(0.001, 6))
    assert found[0][0] > 1  # a bin of one position has no error to weigh it by
    for _, _, factor in found:
        assert factor.value == pytest.approx(5, rel=0.15)  # straight lines between three budgets
        assert factor.interval is not None


def test_whether_loss_is_a_power_law_in_size():
    sizes = np.logspace(3, 6, 6)
    noise = np.exp(np.random.default_rng(1).normal(0, 0.003, 6))
    found = power_law("lmu", 10**6, sizes, PAPER["lmu"].loss(sizes) * noise)
    assert found.law is not None
    assert found.interval is not None
    assert found.interval[0] < 0.072 < found.interval[1]
    assert found.law.scale == pytest.approx(1.95e14, rel=3)
    assert (found.bends, found.worst_residual) == (False, pytest.approx(0.005, abs=0.005))
    assert power_law("lmu", 10**6, sizes, 2 + PAPER["lmu"].loss(sizes / 1e3) * noise).bends
    assert power_law("lmu", 10**6, sizes[:3], sizes[:3]).remark.startswith("3 sizes")
