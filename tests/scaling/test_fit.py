"""Fits of laws: the public tables as published, clean tables exactly, and a certificate that knows what cannot be fitted."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import intervals
import numpy as np
import pytest

from lmu_dist.scaling.certificate import Certificate, certify, unfit
from lmu_dist.scaling.examine import examine, holdout
from lmu_dist.scaling.fit import fit, refit
from lmu_dist.scaling.intervals import resampled, weights
from lmu_dist.scaling.laws import HOFFMANN, KAPLAN_ND, Chinchilla, Gadre, Kaplan, Law, parameters
from lmu_dist.scaling.table import Rows, read_table, rows_of
from lmu_dist.scaling.tell import told

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


def grid(law: Law, noise: float = 0.0, n_sizes: int = 6, n_budgets: int = 6, seed: int = 0) -> Rows:
    n, d = (v.ravel() for v in np.meshgrid(np.logspace(6, 10, n_sizes), np.logspace(8, 11, n_budgets)))
    return rows_of(n, d, law.loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n))))


def last_digit(printed: str) -> float:
    digits, _, exponent = printed.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


@pytest.mark.parametrize(
    ("file", "n", "d", "loss", "where", "n_rows", "objective", "found"), PUBLIC, ids=[p[4][0] if p[4] else p[0] for p in PUBLIC]
)
def test_public_tables(file: str, n: str, d: str, loss: str, where: tuple, n_rows: int, objective: float, found: tuple):
    rows, _, _ = read_table(TABLES / f"{file}.csv", n, d, loss, where)
    assert len(rows) == n_rows
    best = fit(Chinchilla, rows)
    assert best.objective == pytest.approx(objective, rel=1e-5 if objective < 1e-3 else 3e-6)
    for name, value in zip(("E", "A", "B", "alpha", "beta"), found, strict=True):
        assert getattr(best.law, name) == pytest.approx(float(value), abs=1.01 * last_digit(value)), name
    assert certify(best, rows) == Certificate((), 5, 5, best.gradient, best.condition)


def test_gadres_over_training_law_as_its_authors_fit_it():
    path = TABLES / "gadre_overtraining_104_runs.csv"
    where = ("train_dataset=rpj", "N<1e9", "chinchilla_multiplier=1", "chinchilla_multiplier=16")
    rows, _, _ = read_table(path, "N", "D", "loss_c4_val", where)
    small = rows.where((rows.tokens / rows.n_params < 21) | (rows.n_params < 2e7))
    assert len(small) == 5
    seen = examine(Gadre, small, n_resamples=0)
    assert seen.law is not None
    assert parameters(seen.law) == pytest.approx({"E": 1.83665, "a": 166.211, "b": 366.687, "eta": -0.272851}, rel=1e-5)
    assert not seen.intervals  # five runs are met whatever they weigh
    for condition, error in ((("N>1e9", "N<6e9", "chinchilla_multiplier=32"), 0.007103), (("N>6e9",), 0.007320)):
        large, _, _ = read_table(path, "N", "D", "loss_c4_val", ("train_dataset=rpj", *condition))
        assert len(large) == 1
        assert abs(seen.law.loss(large.n_params, large.tokens)[0] / large.loss[0] - 1) == pytest.approx(error, abs=1e-6)


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
def test_clean_tables_give_their_law_back(law: Law):
    found = fit(type(law), grid(law))
    assert parameters(found.law) == pytest.approx(parameters(law), rel=1e-6)
    assert found.objective < 1e-15
    assert certify(found, grid(law)).ok


def test_a_noisy_table_is_fitted_better_than_by_the_truth():
    rows = grid(HOFFMANN, noise=0.003)
    found = fit(Chinchilla, rows)
    residual = np.abs(np.log(HOFFMANN.loss(rows.n_params, rows.tokens) / rows.loss))
    assert found.objective < np.where(residual <= 1e-3, residual**2 / 2, 1e-3 * (residual - 5e-4)).sum()
    assert refit(HOFFMANN, rows).objective == pytest.approx(found.objective, rel=1e-6)


def test_speed():
    rows = grid(HOFFMANN, 0.003, 16, 15)
    began = time.monotonic()
    found = fit(Chinchilla, rows)
    assert certify(found, rows).ok
    assert time.monotonic() - began < 1
    began = time.monotonic()
    resampled(found, rows, weights([str(i) for i in range(240)], 100))
    assert time.monotonic() - began < 6  # a thousand in less than a minute


def flat(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.full_like(n, 3.0)


def noise_only(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return 3 * np.exp(np.random.default_rng(0).normal(0, 0.01, len(n)))


def on_a_line(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return Chinchilla(1.7, 1e5, 20.0, 0.8, 0.2).loss(n, d) * np.exp(np.random.default_rng(1).normal(0, 1e-4, len(n)))


N4, D4 = (v.ravel() for v in np.meshgrid(np.logspace(6, 9, 4), np.logspace(8, 11, 4)))
ONE_ALONE = (np.append(np.tile(np.logspace(6, 9, 5), 2), 1e7), np.append(np.repeat([1e8, 1e11], 5), 1e9))


@pytest.mark.parametrize(
    ("n", "d", "loss", "reason"),
    [
        ([1e6, 1e7, 1e8], [1e8, 1e8, 1e9], lambda n, d: HOFFMANN.loss(n, d), "3 runs; a law of 5 parameters needs"),
        (np.full(16, 1e7), D4, lambda n, d: HOFFMANN.loss(n, d), "N takes 1 value"),
        (N4, np.where(D4 > 1e9, 1e10, 1e9), lambda n, d: HOFFMANN.loss(n, d), "D takes 2 values"),
        (N4, D4, flat, "the loss is the same"),
        (N4, D4, noise_only, "ran to|cannot be told apart"),
        (N4, D4, lambda n, d: 1.69 + 406.4 * n**-0.34, "beta ran to|cannot be told apart"),
        (N4, D4, lambda n, d: 2 + n**0.1 + d**0.1, "alpha is -0.1: the loss rises with N"),
        (N4, D4, lambda n, d: 406.4 * n**-0.34 + 410.7 * d**-0.28, "E ran to zero|cannot be told apart"),
        (*ONE_ALONE, lambda n, d: HOFFMANN.loss(n, d) * np.exp(0.01 * np.sin(7 * np.log(n * d))), "alone fixes a parameter"),
        (np.repeat(np.logspace(6, 9, 20), 2), 20 * np.repeat(np.logspace(6, 9, 20), 2), on_a_line, "two different laws"),
        (N4, D4, lambda n, d: 2 + 0.05 * n**0.2 + 410 * d**-0.28, "alpha is -.*the loss rises with N"),
        (N4, D4, lambda n, d: 1.69 + 4e5 * (n * d) ** -0.3, "E lies anywhere|ran to|cannot be told"),
        (np.tile(N4[::2], 5), np.tile(D4[::2], 5), lambda n, d: HOFFMANN.loss(n, d), "8 runs; a law"),
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
        "one alone",
        "swapped",
        "rising in N",
        "product",
        "copies",
        "proportional",
    ],
)
def test_what_is_not_determined_says_why(n: object, d: object, loss: Callable, reason: str):
    n, d = np.array(n, float), np.array(d, float)
    seen = examine(Chinchilla, rows_of(n, d, loss(n, d)), n_resamples=100)
    assert seen.law is None
    assert not seen.certificate.ok
    assert any(re.search(reason, said) for said in seen.certificate.reasons), seen.certificate.reasons
    facts = told(seen, [str(i) for i in range(len(n))])
    assert facts["parameters"] == facts["intervals"] == {}


def test_an_examination_sees_all_sides():
    rows = grid(HOFFMANN, noise=0.003, seed=1)
    seen = examine(Chinchilla, rows, n_resamples=200)
    assert isinstance(seen.law, Chinchilla)
    assert seen.intervals.keys() == {"E", "A", "B", "alpha", "beta"}
    for name, value in parameters(seen.law).items():
        low, high = seen.intervals[name]
        assert low < value < high
        assert low < getattr(HOFFMANN, name) < high  # with this seed
    for name in ("E", "alpha", "beta"):  # the cross-check is of the same size
        profile, interval = seen.profiles[name], seen.intervals[name]
        assert profile is not None
        assert 0.5 < (profile[1] - profile[0]) / (interval[1] - interval[0]) < 2
    assert seen.holdout is not None
    assert seen.holdout.n_rows == 6
    assert abs(seen.holdout.mean_error or 1) < 0.02
    most = seen.influence["alpha"]
    alone = [refit(seen.law, rows.where(np.arange(36) != i)).law.alpha for i in range(36)]
    assert int(np.abs(np.array(alone) - seen.law.alpha).argmax()) == most.row
    assert alone[most.row] == pytest.approx(most.without, rel=1e-3)


def test_holdout_needs_enough_without_the_largest():
    held = holdout(Chinchilla, grid(HOFFMANN, 0.003, n_sizes=3))
    assert held.mean_error is None
    assert "N takes 2 values" in held.reasons[0]


@pytest.mark.parametrize("form", [Chinchilla, Gadre, Kaplan])
def test_noise_gives_no_number(form: type[Law]):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        n, d = 10 ** rng.uniform(7, 9, 5 + seed * 2), 10 ** rng.uniform(9, 11, 5 + seed * 2)
        seen = examine(form, rows_of(n, d, 3 * np.exp(rng.normal(0, 0.1, len(n)))), n_resamples=100)
        facts = json.dumps(told(seen, [str(i) for i in range(len(n))]), allow_nan=False)
        assert seen.law is None, facts  # and no warning: pytest makes errors of them


def test_the_unit_of_loss_changes_nothing():
    rows = grid(Gadre(1.7, 150, 300, -0.26), 0.003)
    for unit in (1e-30, 1e6):
        scaled = fit(Gadre, rows_of(rows.n_params, rows.tokens, rows.loss * unit))
        assert scaled.law.eta == pytest.approx(fit(Gadre, rows).law.eta, rel=1e-5)  # pyright: ignore
        assert certify(scaled, rows_of(rows.n_params, rows.tokens, rows.loss * unit)).ok


def test_copies_of_a_run_are_one_run():
    rows = grid(HOFFMANN, 0.003)
    tenfold = rows_of(*(np.tile(column, 10) for column in (rows.n_params, rows.tokens, rows.loss)))
    once, often = (examine(Chinchilla, table, n_resamples=100).intervals["alpha"] for table in (rows, tenfold))
    assert often == pytest.approx(once, rel=0.02)


def test_one_absurd_loss_hinders_nothing():
    rows = grid(HOFFMANN, 0.003)
    for absurd in (1e-3, 1e3):
        spoilt = rows_of(rows.n_params, rows.tokens, np.where(np.arange(36) == 9, absurd, rows.loss))
        seen = examine(Chinchilla, spoilt, n_resamples=100)
        assert isinstance(seen.law, Chinchilla)
        assert seen.law.alpha == pytest.approx(0.34, rel=0.1)


def test_intervals_hold_the_truth_about_nine_times_of_ten():
    held = [known for seed in range(24) for known in intervals.study("5x4", seed, 60).values() if known is not None]
    assert len(held) >= 60
    assert 0.78 < np.mean(held) <= 1  # 72 looks, not independent; `python benchmarks/intervals.py` takes more


def test_kaplans_law_does_not_care_for_a_floor():
    assert not unfit(Kaplan, grid(KAPLAN_ND, n_sizes=2))
    assert examine(Kaplan, grid(KAPLAN_ND, 0.002), n_resamples=100).law is not None


def test_tables_refuse_what_is_no_number():
    for n, loss in (([0.0] * 6, [3.0] * 6), ([1e6] * 6, [np.nan] * 6)):
        with pytest.raises(ValueError, match="must be positive"):
            rows_of(n, [1e8] * 6, loss)
    with pytest.raises(ValueError, match="needs more than 3 runs"):
        fit(Chinchilla, rows_of([1e6] * 3, [1e8] * 3, [3.0] * 3))
