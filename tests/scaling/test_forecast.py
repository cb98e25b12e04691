"""Comparing laws, predicting losses and compute-optimal sizes: the right law is supported, and intervals hold the truth."""

from pathlib import Path

import numpy as np
import pytest

from lmu_dist.scaling.compare_laws import compare_laws, held_out_masks, law_intervals
from lmu_dist.scaling.flexible_laws import EXAMPLE_FARSEER, EXAMPLE_GAMMA
from lmu_dist.scaling.forecast import SO_FAR, predict, predict_from
from lmu_dist.scaling.forms import FORMS
from lmu_dist.scaling.laws import Chinchilla, ScalingLaw
from lmu_dist.scaling.optimum import _resampled, optimum_of
from lmu_dist.scaling.plot import plot_fit
from lmu_dist.scaling.published import HOFFMANN
from lmu_dist.scaling.repeated import Overfitted
from lmu_dist.scaling.table import Rows, rows_from_columns
from lmu_dist.scaling.validate import fit_and_validate


def table(law: ScalingLaw, seed: int, sizes: tuple[float, float] = (1e8, 6e9), n_runs: int = 300) -> Rows:
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(np.log(sizes[0]), np.log(sizes[1]), n_runs))
    d = n * np.exp(rng.uniform(0, np.log(50), n_runs))
    return rows_from_columns(n, d, law.loss(n, d) * np.exp(rng.normal(0, 0.002, n_runs)))


def grid(law: ScalingLaw, noise: float = 0.002) -> Rows:
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 3e9, 8), np.geomspace(4e8, 2e11, 8)))
    return rows_from_columns(n, d, law.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, noise, len(n))))


@pytest.mark.parametrize(("law", "name"), [(HOFFMANN, "chinchilla"), (EXAMPLE_GAMMA, "gamma"), (EXAMPLE_FARSEER, "farseer")])
def test_the_true_law_is_supported_and_predicts_larger_runs(law: ScalingLaw, name: str):
    rows, larger = table(law, 1), table(law, 2, (6e9, 2.4e10), 40)
    comparison = compare_laws(rows, holdouts=False)
    assert name in [c.name for c in comparison.supported]
    assert ("chinchilla" in [c.name for c in comparison.supported]) == (law is HOFFMANN)
    assert sum(c.weight for c in comparison.supported) == pytest.approx(1)
    forecast = predict_from(comparison, larger.n_params, larger.tokens, n_resamples=100)
    assert np.median(np.abs(forecast.loss / larger.loss - 1)) < 0.007
    assert 0.7 < np.mean((forecast.low <= larger.loss) & (larger.loss <= forecast.high)) <= 1


def test_held_out_errors_are_those_of_the_largest_runs():
    rows = table(EXAMPLE_GAMMA, 3)
    masks = held_out_masks(rows)
    assert {what for what, _, _ in masks} == {"N", "C"}
    for what, above, held in masks:
        values = rows.n_params if what == "N" else 6 * rows.n_params * rows.tokens
        assert values[held].min() > above
        assert values[~held].max() <= above * 1.02
    errors = {c.name: c.held_out_error for c in compare_laws(rows, [FORMS["gamma"], FORMS["kaplan"]]).candidates}
    assert errors["gamma"] is not None
    assert errors["kaplan"] is not None
    assert errors["gamma"] < 0.004 < errors["kaplan"]


def test_tables_that_no_law_fits_have_wider_intervals_and_say_so():
    rows = table(HOFFMANN, 4)
    waves = rows.loss * (1 + 0.02 * np.sin(1.7 * np.log(rows.n_params)) * np.sin(1.3 * np.log(rows.tokens)))
    odd = rows_from_columns(rows.n_params, rows.tokens, waves)
    comparison = compare_laws(odd)
    assert comparison.chosen is not None
    assert not comparison.fits
    forecast = predict_from(comparison, 2e10, 1e12, n_resamples=100)
    assert forecast.warnings[0].startswith("no law fits the table; the intervals are wider")
    assert {o.reason for o in optimum_of(comparison, 1e21)} == {"no law fits the table"}
    assert forecast.high[0] / forecast.low[0] > 1.02


def test_tables_without_a_certified_law_have_no_forecast():
    few = predict(rows_from_columns([1e7, 1e8, 1e9], [1e9, 1e9, 1e10], [4.0, 3.5, 3.0]), 1e10, 1e11)
    assert "only 3 distinct runs" in few.reasons[0]
    assert np.isnan(few.loss).all()
    rows = grid(HOFFMANN)
    units = rows_from_columns(np.where(rows.n_params < 5e7, rows.n_params / 1e6, rows.n_params), rows.tokens, rows.loss)
    assert "another unit" in predict(units, 1e10, 1e11).reasons[0]


def test_points_far_from_the_table_are_named():
    forecast = predict(grid(HOFFMANN), [3e9, 6e10], [1e11, 1e11], [Chinchilla], n_resamples=100)
    assert forecast.law == "chinchilla"
    assert forecast.laws == ("chinchilla",)
    assert forecast.warnings == ("N is up to 20 times the largest of the table: the interval assumes that a law holds so far",)


def test_repeated_data_give_back_their_law():
    truth = Overfitted(1.8, 530.0, 1950.0, 0.356, 0.362, 15.0, 6.3e-7, 0.5, 4.0)
    n, epochs = (v.ravel() for v in np.meshgrid(np.geomspace(2e7, 3e9, 6), [1, 2, 4, 8, 16, 40]))
    unique = np.repeat([4e8, 2e9], 18)
    d = unique * epochs
    loss = truth.loss(n, d, unique) * np.exp(np.random.default_rng(0).normal(0, 0.002, 36))
    comparison = compare_laws(Rows(n, d, loss, unique), holdouts=False)
    assert [c.name for c in comparison.supported] == ["overfitted"]
    forecast = predict_from(comparison, 1e9, 1e10, 1e9, n_resamples=100)
    assert forecast.loss[0] == pytest.approx(float(truth.loss(1e9, 1e10, 1e9)), rel=0.01)
    assert any(c.misfit and c.misfit.reasons for c in comparison.candidates if c.name == "chinchilla")


def test_compute_optimal_sizes_hold_the_truth_and_biases_are_taken_off():
    sizes, flops = np.geomspace(3e7, 1e10, 14), np.geomspace(1e19, 1e21, 5)
    n, c = (v.ravel() for v in np.meshgrid(sizes, flops))
    near = np.abs(np.log(n / HOFFMANN.optimum(c)[0]) - 0.25 * np.log(c / 1e20)) < 2.2  # centres drift with compute
    n, d = n[near], (c / (6 * n))[near]
    rows = rows_from_columns(n, d, HOFFMANN.loss(n, d) * np.exp(np.random.default_rng(1).normal(0, 5e-4, len(n))))
    true_n, true_exponent = float(HOFFMANN.optimum(1e21)[0]), 0.28 / 0.62
    optima = {o.approach: o for o in optimum_of(compare_laws(rows, [Chinchilla], holdouts=False), 1e21, 200)}
    for approach in ("parabola", "parametric"):
        found = optima[approach]
        assert found.n_params is not None, found.reason
        assert found.n_interval[0] < true_n < found.n_interval[1]  # pyright: ignore[reportOptionalSubscript]
        assert found.exponent_interval[0] < true_exponent < found.exponent_interval[1]  # pyright: ignore[reportOptionalSubscript]
        assert found.tokens == pytest.approx(1e21 / 6 / found.n_params)
    assert abs(optima["parabola"].bias - 1) > 0.01  # pyright: ignore[reportOptionalOperand]
    few = optimum_of(compare_laws(grid(HOFFMANN), [Chinchilla], holdouts=False), 5e20, 100)
    assert few[0].approach == "envelope"
    assert few[0].n_params == pytest.approx(float(HOFFMANN.optimum(5e20)[0]), rel=0.3)
    assert "fewer than three budgets" in few[1].reason
    assert [o.warnings for o in optima.values()] == [()] * 3


def test_an_optimum_far_beyond_the_table_has_warnings_and_comes_from_the_law_only():
    rows = grid(HOFFMANN)
    largest = float(6 * (rows.n_params * rows.tokens).max())
    envelope, _, parametric = optimum_of(compare_laws(rows, [Chinchilla], holdouts=False), 1e6 * largest, 60)
    assert envelope.n_params is None
    assert "says nothing beyond" in envelope.reason
    assert parametric.n_params is not None
    assert parametric.warnings[0] == f"C is 1e+06 times the largest of the table: {SO_FAR}"
    assert any(warning.startswith("D is up to") for warning in parametric.warnings)


def test_the_figure_is_drawn_with_and_without_a_law(tmp_path: Path):
    comparison = compare_laws(grid(HOFFMANN), [Chinchilla], holdouts=False)
    plot_fit(comparison, tmp_path / "fit.png", predict_from(comparison, 1e10, 1e11, n_resamples=100))
    assert (tmp_path / "fit.png").stat().st_size > 10_000
    few = compare_laws(rows_from_columns([1e7, 1e8, 1e9], [1e9, 1e9, 1e10], [4.0, 3.5, 3.0]))
    plot_fit(few, tmp_path / "few.svg")
    assert "no law is determined" in (tmp_path / "few.svg").read_text()


def test_rows_of_one_run_are_resampled_together():
    residuals, labels = np.array([0.1, 0.2, -0.3, 0.4, 0.5]), ["a", "b", "a", "c", "b"]
    drawn = np.array([_resampled(residuals, labels, np.random.default_rng(seed)) / residuals for seed in range(40)])
    assert np.array_equal(np.abs(np.round(drawn)), np.ones((40, 5)))
    assert np.array_equal(drawn[:, 0], drawn[:, 2])
    assert np.array_equal(drawn[:, 1], drawn[:, 4])
    assert len({tuple(row) for row in np.round(drawn).tolist()}) == 8  # all signs of three groups
    alone = _resampled(residuals, ["a", "b", "c", "d", "e"], np.random.default_rng(0))
    assert set(alone) <= set(residuals)


def test_supported_laws_have_intervals_and_others_none():
    few = grid(HOFFMANN)
    comparison = compare_laws(few, [Chinchilla, FORMS["kaplan"]], holdouts=False)
    intervals = law_intervals(comparison, 200)
    assert list(intervals) == [c.name for c in comparison.supported] == ["chinchilla"]
    alone = fit_and_validate(Chinchilla, few, n_resamples=200).intervals
    for name, interval in alone.items():
        assert intervals["chinchilla"][name] == pytest.approx(interval)
    for name, (low, high) in intervals["chinchilla"].items():
        assert 0.8 * low < getattr(HOFFMANN, name) < 1.25 * high
    assert not law_intervals(compare_laws(few, [FORMS["kaplan"]], holdouts=False), 200)
