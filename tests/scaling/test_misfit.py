"""Forms that are wrong are noticed, right ones are not; rows that are not what they seem are named."""

import numpy as np
import pytest

from lmu_dist.scaling.fit import fit
from lmu_dist.scaling.flexible_laws import EXAMPLE_FARSEER, EXAMPLE_GAMMA
from lmu_dist.scaling.laws import Chinchilla, ScalingLaw
from lmu_dist.scaling.misfit import find_misfit, replicate_noise, structure_test
from lmu_dist.scaling.published import HOFFMANN
from lmu_dist.scaling.table import Rows, rows_from_columns
from lmu_dist.scaling.table_checks import check_rows, independent_groups
from lmu_dist.scaling.validate import fit_and_validate


def table(law: ScalingLaw, seed: int, n_runs: int = 404, noise: float = 0.002) -> Rows:
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(np.log(1e8), np.log(6e9), n_runs))
    d = n * np.exp(rng.uniform(0, np.log(50), n_runs))
    return rows_from_columns(n, d, law.loss(n, d) * np.exp(rng.normal(0, noise, n_runs)))


def grid(law: ScalingLaw, noise: float = 0.003, seeds: int = 1) -> Rows:
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(2e7, 3e9, 6), np.geomspace(4e8, 2e11, 6)))
    n, d = np.repeat(n, seeds), np.repeat(d, seeds)
    return rows_from_columns(n, d, law.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, noise, len(n))))


def names(rows: Rows) -> list[str]:
    return [str(i + 1) for i in range(len(rows))]


@pytest.mark.parametrize("law", [EXAMPLE_GAMMA, EXAMPLE_FARSEER], ids=["gamma", "farseer"])
def test_other_forms_are_a_misfit_of_chinchillas_law(law: ScalingLaw):
    for seed in range(2):
        rows = table(law, seed)
        assert any(r.startswith("misfit: ") for r in fit_and_validate(Chinchilla, rows, n_resamples=100).diagnostics.reasons)
        assert find_misfit(fit(type(law), rows), rows).reasons == ()  # its own form fits


def test_the_right_form_is_seldom_called_a_misfit():
    p_values = []
    for seed in range(24):
        rows = table(HOFFMANN, seed, n_runs=[12, 20, 60, 200][seed % 4])
        misfit = find_misfit(fit(Chinchilla, rows), rows)
        p_values.append(misfit.p_value)
    assert np.mean(np.array(p_values) < 0.01) <= 0.05
    assert 0.3 < np.median(p_values) < 0.7  # neither side is favoured


def test_runs_of_one_trunk_are_one_run_in_the_test():
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e8, 6e9, 20), np.geomspace(1e9, 2e11, 6)))
    labels = [f"{size:.0f}" for size in n]
    flagged = dict[str, list[bool]]()
    for law in (HOFFMANN, EXAMPLE_GAMMA):
        for seed in range(12):
            trunks = dict(zip(dict.fromkeys(labels), np.random.default_rng(seed).normal(0, 0.003, 20), strict=True))
            noise = np.random.default_rng(seed + 100).normal(0, 0.0005, len(n)) + np.array([trunks[label] for label in labels])
            rows = rows_from_columns(n, d, law.loss(n, d) * np.exp(noise))
            p_value = structure_test(fit(Chinchilla, rows), rows, labels)[1]
            assert p_value is not None
            flagged.setdefault(type(law).__name__, []).append(p_value < 0.01)
    assert np.mean(flagged["Chinchilla"]) <= 0.1
    assert np.mean(flagged["Gamma"]) >= 0.9


def test_misses_are_given_by_row():
    rows = grid(HOFFMANN)
    spoilt = rows_from_columns(rows.n_params, rows.tokens, np.where(np.arange(36) == 9, 7.3, rows.loss))
    misfit = find_misfit(fit(Chinchilla, spoilt), spoilt)
    assert misfit.worst_rows[0] == 9
    assert misfit.outliers == (9,)
    assert misfit.worst_miss == pytest.approx(HOFFMANN.loss(rows.n_params[9], rows.tokens[9]) / 7.3 - 1, rel=0.02)
    assert 0.0005 < misfit.typical_miss < 0.003  # the noise
    assert not misfit.reasons  # one bad run is not a wrong form
    assert "row 10 is far from the law" in fit_and_validate(Chinchilla, spoilt, n_resamples=100).warnings[-1]


def test_copies_and_near_copies_count_once():
    rows = grid(HOFFMANN)
    for shift in (1.0, 1.000003):
        copied = rows_from_columns(
            np.tile(rows.n_params, 3),
            np.tile(rows.tokens, 3),
            np.concatenate([rows.loss, rows.loss * shift, rows.loss / shift]),
        )
        labels, copies = independent_groups(copied)
        assert len(set(labels)) == 36
        assert len(copies) == 72
        assert "rows 37, 38, 39, 40, 41, 42, ... (72 rows) are copies" in check_rows(copied, names(copied)).warnings[0]
    labels, copies = independent_groups(grid(HOFFMANN, seeds=2))
    assert len(set(labels)) == 72
    assert not copies


def test_other_units_are_named():
    rows = grid(HOFFMANN)
    for column, factor, found in (("N", 1e-6, "N = 20, 54"), ("N", 1e-3, "N = 20,000, 54"), ("D", 1e-9, "D = 0.4, 1.3")):
        n, d = rows.n_params, rows.tokens
        small_n, small_d = n < 6e7, d < 3e9
        spoilt = rows_from_columns(
            np.where(small_n & (column == "N"), n * factor, n), np.where(small_d & (column == "D"), d * factor, d), rows.loss
        )
        (reason,) = check_rows(spoilt, names(rows)).reasons
        assert reason.startswith(f"{column} seems to be in another unit in rows 1, ")
        assert found in reason
    assert not check_rows(rows, names(rows)).reasons
    millions = check_rows(rows_from_columns(rows.n_params / 1e6, rows.tokens, rows.loss), names(rows))
    assert "N and D may be in different units" in millions.warnings[0]


def test_logged_steps_perplexity_and_mixed_settings_are_reasons():
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 3e9, 6), 2e8 * np.arange(1, 21)))
    steps = rows_from_columns(n, d, HOFFMANN.loss(n, d))
    assert "logged steps of training runs are: only 6 runs would be independent" in check_rows(steps, names(steps)).reasons[0]
    runs = Rows(steps.n_params, steps.tokens, steps.loss, run=tuple(f"{size:.0f}" for size in n))
    assert not check_rows(runs, names(runs)).reasons
    rows = grid(HOFFMANN)
    perplexity = rows_from_columns(rows.n_params, rows.tokens, np.exp(rows.loss))
    assert "use its natural logarithm" in check_rows(perplexity, names(rows)).reasons[0]
    twice = grid(HOFFMANN, seeds=2)
    mixed = rows_from_columns(twice.n_params, twice.tokens, twice.loss * np.tile([1.0, 1.17], 36))
    assert "36 of 36 points of the same N and D have losses more than 3 % apart" in check_rows(mixed, names(mixed)).reasons[0]
    odd = rows_from_columns(twice.n_params, twice.tokens, twice.loss * np.where(np.arange(72) == 5, 1.1, 1))
    checks = check_rows(odd, names(odd))
    assert not checks.reasons
    assert "such as rows 5, 6 (losses" in checks.warnings[0]


def test_noise_of_repeated_runs():
    assert replicate_noise(grid(HOFFMANN)) is None
    assert replicate_noise(grid(HOFFMANN, 0.004, seeds=5)) == pytest.approx(0.004, rel=0.3)
