"""Losses in bands of positions: the intervals contain the truth, and correlation, text and seeds count in them."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.signal import lfilter

from lmu_dist.scaling import band_table, bands
from lmu_dist.scaling.band_table import Group, band_rows, band_sentences
from lmu_dist.scaling.bands import (
    Band,
    BandDifference,
    Curves,
    SeedSpread,
    band_difference,
    contrast,
    default_bands,
    flat_from,
    paired_difference,
    seed_spread,
)
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.pair import Pair

NONE = SeedSpread(0.0, 0)
N_STUDIES = 300


def correlated(rng: np.random.Generator, rows: int, n: int, correlation: float) -> Floats:
    """Returns noise of variance 1 in rows (rows, n) with this correlation between neighbours: an autoregressive process."""
    noise = rng.normal(size=(rows, n))
    noise[:, 1:] *= np.sqrt(1 - correlation**2)
    return np.asarray(lfilter([1.0], [1.0, -correlation], noise))


def simulate(
    rng: np.random.Generator, trends: Floats, correlation: float, seed_slope: float = 0.0, constant: float = 0.0
) -> list[Curves]:
    """Returns curves of families with these trends (families, n), two seeds each, on 64 rows of one text.

    `seed_slope`: the deviation of a seed's slope in ln(position). `constant`: of the difficulty of a whole row.
    """
    rows, n = 64, trends.shape[1]
    text = 1.6 * correlated(rng, rows, n, correlation) + constant * rng.normal(size=(rows, 1))
    families = list[Curves]()
    for trend in trends:
        slopes = seed_slope * rng.normal(size=2)
        losses = [
            4 + trend + slope * np.log(np.arange(1, n + 1)) + text + 0.6 * correlated(rng, rows, n, correlation)
            for slope in slopes
        ]
        errors = np.array([of.mean(1).std(ddof=1) / np.sqrt(rows) for of in losses])
        families.append(Curves(np.array([of.mean(0) for of in losses]), errors))
    return families


def trends(n: int) -> Floats:
    t = np.arange(1, n + 1)
    return np.array([0.3 * t**-0.4, 1.0 * t**-0.5], np.float64)


def without_correlation(curve: Floats, early: Band, late: Band) -> float:
    """Half an interval of the difference if neighbouring positions were independent."""
    noise = np.square(np.diff(curve[early.first - 1 : late.last])).mean() / 2
    return float(1.645 * np.sqrt(noise * (1 / len(early) + 1 / len(late))))


@pytest.mark.parametrize(
    ("n", "correlation", "seed_slope"), [(256, 0.0, 0.0), (256, 0.7, 0.0), (256, 0.7, 0.02), (64, 0.5, 0.0)]
)
def test_intervals_contain_the_truth_in_nine_studies_of_ten(n: int, correlation: float, seed_slope: float):
    early, late = bands = default_bands(n) or pytest.fail("no bands")
    truth = trends(n) @ contrast(n, early, late)
    inside = np.zeros((N_STUDIES, 2))  # of the first family alone, of the second one minus it
    naive = np.zeros((N_STUDIES, 2))
    for i in range(N_STUDIES):
        first, second = simulate(np.random.default_rng(i), trends(n), correlation, seed_slope)
        spread = seed_spread([first, second], *bands)
        alone, paired = band_difference(first, *bands, spread), paired_difference(second, first, *bands, spread)
        for j, (found, true, curve) in enumerate(
            ((alone, truth[0], first.mean), (paired, truth[1] - truth[0], second.mean - first.mean))
        ):
            assert found.interval is not None
            inside[i, j] = found.interval[0] <= true <= found.interval[1]
            naive[i, j] = abs(found.value - true) <= without_correlation(curve, early, late)
    assert np.all((inside.mean(0) >= 0.85) & (inside.mean(0) <= 0.97)), inside.mean(0)
    if correlation > 0:  # what a method that ignores correlation would give
        assert np.all(naive.mean(0) < 0.7), naive.mean(0)


def test_text_that_all_families_share_cancels_between_them():
    # What is constant in a row is in the error over rows, and so an interval of one family is too wide, never too narrow.
    early, late = bands = Band(100, 150), Band(200, 256)
    first, second = simulate(np.random.default_rng(0), trends(256), 0.5, constant=2.0)
    alone, paired = band_difference(first, *bands, NONE), paired_difference(second, first, *bands, NONE)
    assert alone.error is not None
    assert paired.error is not None
    assert alone.error == pytest.approx(np.sqrt(256 * np.square(first.errors).mean() * (1 / len(early) + 1 / len(late))))
    assert paired.error < 0.1 * alone.error


def test_seeds_that_use_context_differently_count():
    bands = Band(100, 150), Band(200, 256)
    groups = [group for i in range(40) for group in simulate(np.random.default_rng(i), np.zeros((1, 256)), 0.5, seed_slope=0.3)]
    spread = seed_spread(groups, *bands)
    t = np.arange(1, 257)
    assert spread.freedom == 40
    assert np.sqrt(spread.variance) == pytest.approx(0.3 * abs(contrast(256, *bands) @ np.log(t)), rel=0.3)
    few, many = (band_difference(Curves(np.zeros((k, 256)), np.full(k, 1e-9)), *bands, spread) for k in (1, 4))
    assert (few.error, many.error) == pytest.approx((np.sqrt(spread.variance), np.sqrt(spread.variance / 4)))
    assert seed_spread([Curves(np.zeros((1, 256)), np.zeros(1))], *bands) == NONE


def test_default_bands_are_the_protocols_at_256_tokens():
    assert default_bands(256) == (Band(100, 150), Band(200, 256))
    assert default_bands(1024) == (Band(399, 599), Band(799, 1024))
    assert default_bands(1) is None
    for n in range(8, 200):
        early, late = default_bands(n) or pytest.fail(f"{n} tokens have no bands")
        assert contrast(n, early, late).sum() == pytest.approx(0)


def test_bad_bands_are_an_error_and_what_is_unknown_has_no_interval():
    curves = Curves(np.zeros((2, 16)), np.full(2, np.nan))
    for early, late in (
        (Band(1, 8), Band(8, 16)),
        (Band(0, 8), Band(9, 16)),
        (Band(1, 8), Band(9, 17)),
        (Band(9, 16), Band(1, 8)),
    ):
        with pytest.raises(ValueError, match="are no bands of positions 1 to 16, one after the other"):
            band_difference(curves, early, late, NONE)
    bands = Band(1, 8), Band(9, 16)
    assert band_difference(curves, *bands, NONE) == BandDifference(*bands, 0.0, None, None)  # no error over rows was recorded
    for errors in ([0.0, 0.0], [0.0, 0.1]):  # of one validation row
        of_one_row = Curves(np.zeros((2, 16)), np.array(errors))
        assert band_difference(of_one_row, *bands, NONE) == BandDifference(*bands, 0.0, None, None)
    assert paired_difference(curves, curves, Band(1, 1), Band(2, 2), NONE).interval is None  # too short for noise to be seen
    with pytest.raises(ValueError, match="curves of 16 and 8 positions"):
        paired_difference(curves, Curves(np.zeros((2, 8)), np.zeros(2)), *bands, NONE)


def test_where_a_curve_is_flat():
    t = np.arange(1, 1025)
    rng = np.random.default_rng(0)
    noise, error = rng.normal(0, 0.01, 1024), np.full(1, 0.01 / 32)
    level = flat_from(Curves((5 + 2 / np.sqrt(np.minimum(t, 100)) + noise)[None], error), lambda *_: NONE)
    assert level.position == pytest.approx(100, rel=0.45)
    assert level.hidden is not None
    assert 0 <= level.hidden < 0.01
    falling = flat_from(Curves((6 - 0.3 * np.log(t) + noise)[None], error), lambda *_: NONE)
    assert falling.position is None
    unknown = flat_from(Curves(np.zeros((1, 1024)), np.full(1, np.nan)), lambda *_: NONE)
    assert (unknown.position, unknown.hidden) == (None, None)


def test_rows_of_two_sequence_lengths_and_what_they_say():
    curves = {
        Group(family, size, n, 1000): found
        for n in (256, 128)
        for size in (100, 200)
        for family, found in zip(
            ("lmu", "lmu_attention", "transformer"),
            simulate(
                np.random.default_rng(n + size), np.vstack([0 * trends(n)[:1], 20 * trends(n)[1:], 0 * trends(n)[:1]]), 0.3
            ),
            strict=True,
        )
    }
    rows = band_rows(curves, Pair("transformer", "lmu"))
    assert [(row.family, row.n_params, row.sequence_tokens) for row in rows] == [
        (g.family, g.n_params, g.sequence_tokens) for g in curves
    ]
    assert {row.family: row.reference for row in rows} == {"lmu": "transformer", "lmu_attention": "lmu", "transformer": "lmu"}
    for row in rows:
        assert row.paired is not None
        assert row.difference.side == (1 if row.family == "lmu_attention" else 0)
        assert row.family != "lmu_attention" or row.paired.side == 1
        assert row.paired.late.last == row.sequence_tokens
    sentences = band_sentences(rows, str.upper)
    assert (
        len(
            [
                s
                for s in sentences
                if "At N = 200 and 1,000 tokens of training, from positions 100 to 150 to positions 200 to 256" in s
            ]
        )
        == 2
    )
    assert "the loss falls beyond the noise for LMU_ATTENTION." in sentences[0]
    assert any(
        s.startswith("At N = 200 and 1,000 tokens of training the loss of LMU_ATTENTION falls by 0.")
        and "more than that of LMU (90 %: +" in s
        for s in sentences
    )
    assert all(
        row.sequence_tokens == 256 for row in band_rows(curves, Pair("transformer", "lmu"), (Band(100, 150), Band(200, 256)))
    )
    alone = {group: found for group, found in curves.items() if group.family == "lmu"}
    assert all(row.paired is None for row in band_rows(alone, Pair("transformer", "lmu")))


def test_work_does_not_grow_with_the_number_of_groups(monkeypatch: pytest.MonkeyPatch):
    calls = Counter[tuple[int, Band, Band]]()

    def counted(groups: Sequence[Curves], early: Band, late: Band) -> SeedSpread:
        calls[groups[0].losses.shape[1], early, late] += 1
        return seed_spread(groups, early, late)

    monkeypatch.setattr(band_table, "seed_spread", counted)
    rng, sizes = np.random.default_rng(0), (100, 200, 300, 400)
    curves = {
        Group(family, size, n, 1000): Curves(rng.normal(5, 0.1, (2, n)), np.full(2, 0.01))
        for size in sizes
        for family in ("lmu", "transformer")
        for n in (64, 128)  # lengths alternate, so that one length's results must outlive the other's
    }
    bands._cosines.cache_clear()
    assert len(band_rows(curves, Pair("transformer", "lmu"))) == len(curves)
    assert set(calls.values()) == {1}
    assert {n for n, _, _ in calls} == {64, 128}
    assert bands._cosines.cache_info().misses == len(calls)


def test_cosines_are_orthonormal_and_without_trend_and_contrast():
    for n in (8, 16, 64, 256, 1000):
        for used in (default_bands(n), (Band(1, 1), Band(2, n)), (Band(n // 4, n // 2), Band(n // 2 + 1, n))):
            assert used is not None
            basis = bands._cosines(n, *used)
            assert basis.T @ basis == pytest.approx(np.eye(basis.shape[1]), abs=1e-12)
            inside = slice(used[0].first - 1, used[1].last)
            t = np.arange(1, n + 1)[inside]
            for known in (np.ones(len(t)), np.log(t), contrast(n, *used)[inside]):
                assert known @ basis[inside] == pytest.approx(0, abs=1e-9)


def falling(slope: float) -> Curves:
    """Curves of two seeds that fall by `slope` nats with each position, with little noise."""
    noise = np.random.default_rng(0).normal(0, 1e-3, (2, 64))
    return Curves(5 - slope * np.arange(64) + noise, np.full(2, 1e-4))


def test_partners_have_the_same_size_sequence_length_and_budget():
    curves = {
        Group("lmu", 100, 64, 1000): falling(0.01),
        Group("lmu_attention", 100, 64, 1000): falling(0.02),
        Group("lmu_attention", 200, 64, 1000): falling(0.02),
        Group("transformer", 100, 64, 1000): falling(0.01),
        Group("transformer", 200, 64, 1000): falling(0.01),
        Group("lmu", 200, 64, 2000): falling(0.01),  # of another budget
    }
    rows = band_rows(curves, Pair("transformer", "lmu"))
    assert [(row.family, row.n_params, row.reference) for row in rows] == [
        ("lmu", 100, "transformer"),
        ("lmu_attention", 100, "lmu"),
        ("lmu_attention", 200, "transformer"),
        ("transformer", 100, "lmu"),
        ("transformer", 200, None),
        ("lmu", 200, None),
    ]


def test_sentences_have_every_family_at_its_largest_size_and_do_not_mix_budgets():
    curves = {
        Group("lmu", 100, 64, 1000): falling(0.01),  # ends one size earlier
        Group("lmu_attention", 100, 64, 1000): falling(0.02),
        Group("lmu_attention", 200, 64, 1000): falling(0.02),
        Group("transformer", 200, 64, 1000): falling(0.01),
        Group("llama", 200, 64, 3000): falling(0.01),  # of another budget
    }
    sentences = band_sentences(band_rows(curves, Pair("transformer", "lmu")), str.upper)
    verb = ", from positions 25 to 37 to positions 50 to 64 the loss falls beyond the noise for"
    assert [s.split(" (90 %")[0] for s in sentences] == [
        f"At N = 200 and 3,000 tokens of training{verb} LLAMA.",
        f"At N = 200 and 1,000 tokens of training{verb} LMU_ATTENTION, TRANSFORMER.",
        "At N = 200 and 1,000 tokens of training the loss of LMU_ATTENTION falls by 0.26 nats more than that of TRANSFORMER",
        f"At N = 100 and 1,000 tokens of training{verb} LMU.",
        "At N = 100 and 1,000 tokens of training the loss of LMU_ATTENTION falls by 0.26 nats more than that of LMU",
    ]
