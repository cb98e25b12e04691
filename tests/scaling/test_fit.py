"""Fits of laws: exact on clean tables, right within the noise on others, clear on what cannot be fitted."""

import numpy as np
import pytest

from lmu_dist.scaling.fit import fit_chinchilla
from lmu_dist.scaling.laws import Chinchilla

HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


def table(law: Chinchilla, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d = (v.ravel() for v in np.meshgrid(np.logspace(6, 10, 6), np.logspace(8, 11, 6)))
    return n, d, law.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, noise, len(n)))


@pytest.mark.parametrize(
    "law", [HOFFMANN, Chinchilla(2.1, 30.0, 3e5, 0.2, 0.6), Chinchilla(0.5, 1e4, 2e3, 0.55, 0.35)], ids=["hoffmann", "b", "c"]
)
def test_clean_tables_give_their_law_back(law: Chinchilla):
    found = fit_chinchilla(*table(law))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=1e-6)
    assert found.objective < 1e-15


def test_a_noisy_table_is_fitted_better_than_by_the_truth():
    n, d, loss = table(HOFFMANN, noise=0.003)
    found = fit_chinchilla(n, d, loss)
    assert found.law.alpha == pytest.approx(0.34, rel=0.1)
    residual = np.abs(np.log(HOFFMANN.loss(n, d) / loss))
    huber = np.where(residual <= 1e-3, residual**2 / 2, 1e-3 * (residual - 5e-4)).sum()
    assert found.objective < huber
    assert found.gradient < 1e-8


def test_a_start_changes_nothing_but_the_time():
    rows = table(HOFFMANN, noise=0.003)
    cold, warm = fit_chinchilla(*rows), fit_chinchilla(*rows, start=HOFFMANN)
    assert warm.objective == pytest.approx(cold.objective, rel=1e-6)


def test_tokens_for_a_loss_invert_the_law_and_stop_at_the_floor():
    loss = HOFFMANN.loss(1e8, 3e9)
    assert HOFFMANN.tokens_for(loss, 1e8) == pytest.approx(3e9)
    assert np.isnan(HOFFMANN.tokens_for(1.7, 1e8))


@pytest.mark.parametrize(
    ("n", "loss", "message"),
    [
        ([1e6] * 5, [3.0] * 5, "at least 6 runs"),
        ([0.0] * 6, [3.0] * 6, "must be positive"),
        ([1e6] * 6, [np.nan] * 6, "must be positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(n: list, loss: list, message: str):
    with pytest.raises(ValueError, match=message):
        fit_chinchilla(np.array(n), np.array([1e8] * len(n)), np.array(loss))
