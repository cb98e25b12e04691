"""Fitting laws: published values of public tables, exact recovery without noise, and diagnostics of undetermined laws."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import intervals
import numpy as np
import pytest

from lmu_dist.scaling.as_json import fit_to_json
from lmu_dist.scaling.constraints import NONE, Constraints
from lmu_dist.scaling.diagnostics import FitDiagnostics, check_table, diagnose
from lmu_dist.scaling.fit import fit, refit
from lmu_dist.scaling.intervals import bootstrap_weights, fit_resamples
from lmu_dist.scaling.laws import Chinchilla, Gadre, Kaplan, ScalingLaw, parameters
from lmu_dist.scaling.published import HOFFMANN, KAPLAN_ND
from lmu_dist.scaling.read_table import read_table
from lmu_dist.scaling.table import Rows, rows_from_columns
from lmu_dist.scaling.validate import fit_and_profile, fit_and_validate, holdout

TABLES = Path(__file__).parent / "tables"
PUBLIC = [
    # file, N, D, loss, conditions, rows, objective, parameters E A B alpha beta with the digits printed
    ("kyo_takano_llm_example", "N", "D", "loss", (), 234, 8.400931e-4, ("1.78389", "442.164", "1271.808", ".34263", ".34200")),
    (
        "gemstones_cool_end",
        "params_active_precise",
        "tokens",
        "final_loss",
        (),
        199,
        1.96409e-3,
        ("2.0748", "226.1", "2.717e5", ".3003", ".5802"),
    ),
    *[
        ("gadre_overtraining_104_runs", "N", "D", "loss_c4_val", (f"train_dataset={data}",), rows, objective, found)
        for data, rows, objective, found in (
            ("c4_original", 34, 5.299541e-4, ("1.62002", "122.553", "242.609", ".25257", ".26223")),
            ("rpj", 35, 4.265108e-4, ("1.72024", "106.091", "297.976", ".24308", ".27301")),
            ("rw_original", 35, 4.757255e-4, ("1.70134", "76.774", "384.160", ".22259", ".28977")),
        )
    ],
]


def grid(law: ScalingLaw, noise: float = 0.0, n_sizes: int = 6, n_budgets: int = 6, seed: int = 0) -> Rows:
    n, d = (v.ravel() for v in np.meshgrid(np.logspace(6, 10, n_sizes), np.logspace(8, 11, n_budgets)))
    return rows_from_columns(n, d, law.loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n))))


def last_digit(printed: str) -> float:
    digits, _, exponent = printed.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


@pytest.mark.parametrize(
    ("file", "n", "d", "loss", "where", "n_rows", "objective", "found"), PUBLIC, ids=[p[4][0] if p[4] else p[0] for p in PUBLIC]
)
def test_fits_of_public_tables_match_the_published_values(
    file: str, n: str, d: str, loss: str, where: tuple, n_rows: int, objective: float, found: tuple
):
    rows = read_table(TABLES / f"{file}.csv", n, d, loss, where).rows
    assert len(rows) == n_rows
    best = fit(Chinchilla, rows)
    assert best.objective == pytest.approx(objective, rel=1e-5 if objective < 1e-3 else 3e-6)
    for name, value in zip(("E", "A", "B", "alpha", "beta"), found, strict=True):
        assert getattr(best.law, name) == pytest.approx(float(value), abs=1.01 * last_digit(value)), name
    assert diagnose(best, rows) == FitDiagnostics((), 5, 5, best.gradient, best.condition)


def test_gadres_law_matches_its_authors_fit():
    path = TABLES / "gadre_overtraining_104_runs.csv"
    where = ("train_dataset=rpj", "N<1e9", "chinchilla_multiplier=1", "chinchilla_multiplier=16")
    rows = read_table(path, "N", "D", "loss_c4_val", where).rows
    small = rows.where((rows.tokens / rows.n_params < 21) | (rows.n_params < 2e7))
    assert len(small) == 5
    result = fit_and_validate(Gadre, small, n_resamples=0)
    assert result.law is not None
    assert parameters(result.law) == pytest.approx({"E": 1.83665, "a": 166.211, "b": 366.687, "eta": -0.272851}, rel=1e-5)
    assert not result.intervals  # the law meets five runs almost exactly for any weights
    for condition, error in ((("N>1e9", "N<6e9", "chinchilla_multiplier=32"), 0.007103), (("N>6e9",), 0.007320)):
        large = read_table(path, "N", "D", "loss_c4_val", ("train_dataset=rpj", *condition)).rows
        assert len(large) == 1
        assert abs(result.law.loss(large.n_params, large.tokens)[0] / large.loss[0] - 1) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(
    "law",
    [
        HOFFMANN,
        Chinchilla(2.1, 30.0, 3e5, 0.2, 0.6),
        Chinchilla(0.5, 1e4, 2e3, 0.55, 0.35),
        Gadre(1.7, 150, 300, -0.26),
        KAPLAN_ND,
    ],
    ids=["hoffmann", "b", "c", "gadre", "kaplan"],
)
def test_tables_without_noise_recover_their_law(law: ScalingLaw):
    found = fit(type(law), grid(law))
    assert parameters(found.law) == pytest.approx(parameters(law), rel=1e-6)
    assert found.objective < 1e-15
    assert diagnose(found, grid(law)).passed


def test_the_fit_of_a_noisy_table_has_a_lower_objective_than_the_truth():
    rows = grid(HOFFMANN, noise=0.003)
    found = fit(Chinchilla, rows)
    residual = np.abs(np.log(HOFFMANN.loss(rows.n_params, rows.tokens) / rows.loss))
    assert found.objective < np.where(residual <= 1e-3, residual**2 / 2, 1e-3 * (residual - 5e-4)).sum()
    assert refit(HOFFMANN, rows).objective == pytest.approx(found.objective, rel=1e-6)


def test_fitting_and_resampling_are_fast():
    rows = grid(HOFFMANN, 0.003, 16, 15)
    started_at = time.process_time()
    found = fit(Chinchilla, rows)
    assert diagnose(found, rows).passed
    assert time.process_time() - started_at < 1
    started_at = time.process_time()
    fit_resamples(found, rows, bootstrap_weights([str(i) for i in range(240)], 100))
    assert time.process_time() - started_at < 6  # a thousand in less than a minute


def constant_loss(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.full_like(n, 3.0)


def noise_only(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return 3 * np.exp(np.random.default_rng(0).normal(0, 0.01, len(n)))


def fixed_tokens_per_parameter(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return Chinchilla(1.7, 1e5, 20.0, 0.8, 0.2).loss(n, d) * np.exp(np.random.default_rng(1).normal(0, 1e-4, len(n)))


N4, D4 = (v.ravel() for v in np.meshgrid(np.logspace(6, 9, 4), np.logspace(8, 11, 4)))
ONE_DECISIVE_RUN = (np.append(np.tile(np.logspace(6, 9, 5), 2), 1e7), np.append(np.repeat([1e8, 1e11], 5), 1e9))


@pytest.mark.parametrize(
    ("n", "d", "loss", "reason"),
    [
        (
            [1e6, 1e7, 1e8],
            [1e8, 1e8, 1e9],
            lambda n, d: HOFFMANN.loss(n, d),
            "only 3 distinct runs",
        ),
        (np.full(16, 1e7), D4, lambda n, d: HOFFMANN.loss(n, d), "only 1 distinct value of N"),
        (N4, np.where(D4 > 1e9, 1e10, 1e9), lambda n, d: HOFFMANN.loss(n, d), "only 2 distinct values of D"),
        (N4, D4, constant_loss, "the loss is the same"),
        (N4, D4, noise_only, "went to|cannot be separated"),
        (N4, D4, lambda n, d: 1.69 + 406.4 * n**-0.34, "beta went to|cannot be separated"),
        (N4, D4, lambda n, d: 2 + n**0.1 + d**0.1, "alpha is -0.1: the fitted loss rises with N"),
        (N4, D4, lambda n, d: 406.4 * n**-0.34 + 410.7 * d**-0.28, "E went to zero|cannot be separated"),
        (
            *ONE_DECISIVE_RUN,
            lambda n, d: HOFFMANN.loss(n, d) * np.exp(0.01 * np.sin(7 * np.log(n * d))),
            "a single run determines",
        ),
        (
            np.repeat(np.logspace(6, 9, 20), 2),
            20 * np.repeat(np.logspace(6, 9, 20), 2),
            fixed_tokens_per_parameter,
            "two different laws",
        ),
        (N4, D4, lambda n, d: 2 + 0.05 * n**0.2 + 410 * d**-0.28, "alpha is -.*the fitted loss rises with N"),
        (N4, D4, lambda n, d: 1.69 + 4e5 * (n * d) ** -0.3, "E is known too imprecisely|went to|cannot be separated|misfit"),
        (np.tile(N4[::2], 5), np.tile(D4[::2], 5), lambda n, d: HOFFMANN.loss(n, d), "only 8 distinct runs"),
        (np.logspace(6, 9, 12), 20 * np.logspace(6, 9, 12), lambda n, d: HOFFMANN.loss(n, d) * np.exp(0.01 * np.sin(n)), "."),
    ],
    ids=[
        "few",
        "one N",
        "two D",
        "flat",
        "noise",
        "no D",
        "rising",
        "no floor",
        "one decisive run",
        "swapped",
        "rising in N",
        "product",
        "copies",
        "proportional",
    ],
)
def test_undetermined_laws_have_a_reason(n: object, d: object, loss: Callable, reason: str):
    n, d = np.array(n, float), np.array(d, float)
    result = fit_and_validate(Chinchilla, rows_from_columns(n, d, loss(n, d)), n_resamples=100)
    assert result.law is None
    assert not result.diagnostics.passed
    assert any(re.search(reason, found_reason) for found_reason in result.diagnostics.reasons), result.diagnostics.reasons
    facts = fit_to_json(result, [str(i) for i in range(len(n))])
    assert facts["parameters"] == facts["intervals"] == {}


def test_fit_and_validate_returns_all_diagnostics():
    rows = grid(HOFFMANN, noise=0.003, seed=1)
    result = fit_and_validate(Chinchilla, rows, n_resamples=200)
    assert isinstance(result.law, Chinchilla)
    assert result.intervals.keys() == {"E", "A", "B", "alpha", "beta"}
    for name, value in parameters(result.law).items():
        low, high = result.intervals[name]
        assert low < value < high
        assert low < getattr(HOFFMANN, name) < high  # with this seed
    for name in ("E", "alpha", "beta"):  # profile and bootstrap intervals have similar widths
        profile, interval = result.profiles[name], result.intervals[name]
        assert profile is not None
        assert 0.5 < (profile[1] - profile[0]) / (interval[1] - interval[0]) < 2
    assert result.holdout is not None
    assert result.holdout.n_rows == 6
    assert abs(result.holdout.mean_error or 1) < 0.02
    strongest = result.influence["alpha"]
    without_run = [parameters(refit(result.law, rows.where(np.arange(36) != i)).law)["alpha"] for i in range(36)]
    assert int(np.abs(np.array(without_run) - result.law.alpha).argmax()) == strongest.row
    assert without_run[strongest.row] == pytest.approx(strongest.without, rel=1e-3)


def test_holdout_needs_enough_smaller_sizes():
    holdout_result = holdout(Chinchilla, grid(HOFFMANN, 0.003, n_sizes=3))
    assert holdout_result.mean_error is None
    assert "only 2 distinct values of N" in holdout_result.reasons[0]


@pytest.mark.parametrize("form", [Chinchilla, Gadre, Kaplan])
def test_pure_noise_determines_no_law(form: type[ScalingLaw]):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        n, d = 10 ** rng.uniform(7, 9, 5 + seed * 2), 10 ** rng.uniform(9, 11, 5 + seed * 2)
        result = fit_and_validate(form, rows_from_columns(n, d, 3 * np.exp(rng.normal(0, 0.1, len(n)))), n_resamples=100)
        facts = json.dumps(fit_to_json(result, [str(i) for i in range(len(n))]), allow_nan=False)
        assert result.law is None, facts  # there is no warning either: pytest turns warnings into errors


def test_the_unit_of_loss_does_not_matter():
    rows = grid(Gadre(1.7, 150, 300, -0.26), 0.003)
    for unit in (1e-30, 1e6):
        scaled = fit(Gadre, rows_from_columns(rows.n_params, rows.tokens, rows.loss * unit))
        assert scaled.law.eta == pytest.approx(fit(Gadre, rows).law.eta, rel=1e-5)  # pyright: ignore
        assert diagnose(scaled, rows_from_columns(rows.n_params, rows.tokens, rows.loss * unit)).passed


def test_duplicate_rows_count_as_one_run():
    rows = grid(HOFFMANN, 0.003)
    tenfold = rows_from_columns(np.tile(rows.n_params, 10), np.tile(rows.tokens, 10), np.tile(rows.loss, 10))
    interval, tenfold_interval = (
        fit_and_validate(Chinchilla, table, n_resamples=100).intervals["alpha"] for table in (rows, tenfold)
    )
    assert tenfold_interval == pytest.approx(interval, rel=0.02)


def test_one_outlier_does_not_prevent_a_fit():
    rows = grid(HOFFMANN, 0.003)
    for absurd in (1e-3, 1e3):
        spoilt = rows_from_columns(rows.n_params, rows.tokens, np.where(np.arange(36) == 9, absurd, rows.loss))
        result = fit_and_validate(Chinchilla, spoilt, n_resamples=100)
        assert isinstance(result.law, Chinchilla)
        assert result.law.alpha == pytest.approx(0.34, rel=0.1)


def test_intervals_contain_the_truth_in_about_nine_of_ten_studies():
    holdout_result = [
        known for seed in range(24) for known in intervals.simulate_study("5x4", seed, 60).values() if known is not None
    ]
    assert len(holdout_result) >= 60
    assert 0.78 < np.mean(holdout_result) <= 1  # up to 72 dependent intervals; benchmarks/intervals.py has more


def test_kaplans_law_needs_no_irreducible_loss():
    assert not check_table(Kaplan, grid(KAPLAN_ND, n_sizes=2))
    assert fit_and_validate(Kaplan, grid(KAPLAN_ND, 0.002), n_resamples=100).law is not None


def test_a_profile_that_finds_a_better_optimum_restarts_the_fit():
    # Runs of nearly one budget: the objective has several valleys.
    n = [214663680, 429260800, 268304384, 536560640, 357711872, 268304384, 214663680, 214663680, 107318272]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        sizes = np.array(n * 2, float) * rng.uniform(0.98, 1.02, 18)
        tokens = 2e19 / sizes * rng.uniform(0.3, 1.2, 18)
        rows = rows_from_columns(sizes, tokens, HOFFMANN.loss(sizes, tokens) * np.exp(rng.normal(0, 0.01, 18)))
        fitted, diagnostics, profiles, _, _ = fit_and_profile(Chinchilla, rows, NONE)
        for name, profile in profiles.items():  # no end of a profile is below the optimum
            for end in profile or ():
                held = refit(fitted.law, rows, constraints=Constraints({name: end}))
                assert held.minimised_objective >= fitted.minimised_objective * (1 - 1e-6)
        assert diagnostics.reasons or profiles.keys() == {"E", "alpha", "beta"}


def test_invalid_numbers_and_too_few_rows_are_errors():
    for n, loss in (([0.0] * 6, [3.0] * 6), ([1e6] * 6, [np.nan] * 6)):
        with pytest.raises(ValueError, match="must be positive"):
            rows_from_columns(n, [1e8] * 6, loss)
    with pytest.raises(ValueError, match="needs more than 3 runs"):
        fit(Chinchilla, rows_from_columns([1e6] * 3, [1e8] * 3, [3.0] * 3))
