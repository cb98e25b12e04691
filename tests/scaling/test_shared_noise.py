"""Noise that runs of a trunk share: its parts, and intervals that know of it."""

from dataclasses import replace

import numpy as np
import pytest

from lmu_dist.scaling.fit import fit, refit
from lmu_dist.scaling.flexible_laws import Gamma
from lmu_dist.scaling.intervals import bootstrap_weights, fit_resamples, resample, resampled_units, small_sample_correction
from lmu_dist.scaling.laws import Chinchilla, Floats
from lmu_dist.scaling.misfit import find_misfit
from lmu_dist.scaling.objective import Objective
from lmu_dist.scaling.shared_noise import find_noise, with_shared_noise
from lmu_dist.scaling.table import Rows

LAW = Chinchilla(E=1.6, A=14.0, B=55.0, alpha=0.30, beta=0.29)


def study(n_seeds: int, shared: float, seed: int, noise: float = 0.003) -> tuple[Rows, list[str]]:
    """Four sizes, five budgets; a share of the noise's variance is that of the trunk, a size and seed."""
    n, k, d = (v.ravel() for v in np.meshgrid(np.geomspace(3e3, 1e6, 4), np.arange(float(n_seeds)), np.geomspace(3e5, 3e7, 5)))
    labels = [f"{size:.6g}/{number:g}" for size, number in zip(n, k, strict=True)]
    trunks, rng = np.unique(labels, return_inverse=True)[1], np.random.default_rng(seed)
    z = np.sqrt(shared) * rng.normal(size=len(n))[trunks] + np.sqrt(1 - shared) * rng.normal(size=len(n))
    return Rows(n, d, LAW.loss(n, d) * np.exp(noise * z)), labels


def vectors(laws: list, rows: Rows) -> Floats:
    objective = Objective(Chinchilla, rows)
    return np.array([objective.vector(law) for law in laws])


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_the_parts_of_the_noise_are_found(shared: float):
    rows, labels = study(60, shared, 0)
    noise = find_noise([(refit(LAW, rows), rows, labels)])
    assert noise.deviation == pytest.approx(0.003, rel=0.1)
    assert noise.shared == pytest.approx(shared, abs=0.08)


def test_a_law_without_an_effect_of_the_tokens_has_noise_too():
    """A fit may find that a prefactor is zero; its derivatives by the prefactor and its exponent are zero."""
    flat = replace(LAW, B=0.0)
    for n_seeds in (60, 2):
        rows, labels = study(n_seeds, 0.6, 0)
        noisy = rows.loss / LAW.loss(rows.n_params, rows.tokens) * flat.loss(rows.n_params, rows.tokens)
        fitted = replace(refit(LAW, rows), law=flat)
        rows = replace(rows, loss=noisy)
        if n_seeds == 60:
            noise = find_noise([(fitted, rows, labels)])
            assert noise.deviation == pytest.approx(0.003, rel=0.1)
            assert noise.shared == pytest.approx(0.6, abs=0.08)
        assert 0 < find_misfit(fitted, rows, labels).p_value <= 1


def test_laws_of_resamples_are_as_far_apart_as_those_of_new_studies():
    """The covariance of the coordinates of fits to 400 simulated studies is the independent value."""
    simulated = [study(2, 0.5, seed) for seed in range(150)]
    found = np.array([vectors([refit(LAW, rows).law], rows)[0] for rows, _ in simulated])
    truth = np.sqrt(np.diag(np.cov(found.T)))
    spread, single = [], []
    for rows, labels in simulated[:12]:
        fitted = refit(LAW, rows)
        laws = fit_resamples(fitted, rows, bootstrap_weights([str(i) for i in range(len(rows))], 60))
        correction = small_sample_correction(fitted, rows, labels)
        for made, kept in ((laws, single), (with_shared_noise(laws, fitted, rows, labels), spread)):
            kept.append(correction * vectors(made, rows).std(axis=0))
    alpha = 3
    assert np.median(single, axis=0)[alpha] < 0.75 * truth[alpha]
    assert np.median(spread, axis=0) == pytest.approx(truth, rel=0.2)


def test_few_groups_are_resampled_run_by_run_and_many_as_a_whole():
    rows, labels = study(2, 0.5, 0)
    assert len(set(resampled_units(rows, labels))) == 40
    many, names = study(5, 0.5, 0)
    assert resampled_units(many, names) == names
    n, d, loss = (np.repeat(v, 2) for v in (rows.n_params[:9], rows.tokens[:9], rows.loss[:9]))
    copies = Rows(n, d, loss)
    twice = [str(i // 2) for i in range(18)]
    assert resampled_units(copies, twice) == twice
    fitted = fit(Chinchilla, rows)
    whole = resample(fitted, rows, labels, 12)
    assert [law.E for law in resample(fitted, rows, labels, 12, first=5)] == pytest.approx([law.E for law in whole[5:]])  # pyright: ignore


def test_shared_noise_is_no_misfit_and_hides_none():
    wrong = Gamma(E=1.0, A=60.0, B=700.0, alpha=0.42, beta=0.45, gamma=0.6)
    found = dict[bool, int]()
    for is_wrong in (False, True):
        tables = [study(2, 0.8, seed) for seed in range(20)]
        factor = wrong.loss(tables[0][0].n_params, tables[0][0].tokens) / LAW.loss(tables[0][0].n_params, tables[0][0].tokens)
        tables = [(Rows(t.n_params, t.tokens, t.loss * (factor if is_wrong else 1)), labels) for t, labels in tables]
        found[is_wrong] = sum(bool(find_misfit(refit(LAW, rows), rows, labels).reasons) for rows, labels in tables)
    assert found[False] <= 1
    assert found[True] >= 19
