"""The frozen memory against closed forms and scipy's discretisation."""

import numpy as np
import pytest
from scipy.signal import cont2discrete

from lmu_dist.models.mixers.lmu.legendre import (
    continuous_matrices,
    discrete_matrices,
    impulse_response,
    memory_tokens,
    row_scale,
)


def test_continuous_matrices_of_order_three():
    a, b = continuous_matrices(3, 1.0)
    assert np.array_equal(a, [[-1, -1, -1], [3, -3, -3], [-5, 5, -5]])
    assert np.array_equal(b, [1, -3, 5])


@pytest.mark.parametrize(("order", "theta"), [(1, 7.0), (6, 10.0), (60, 40.0), (100, 1024.0), (250, 1024.0)])
def test_discrete_matrices_equal_scipys(order: int, theta: float):
    a, b = continuous_matrices(order, theta)
    a_bar, b_bar, *_ = cont2discrete((a, b[:, None], np.ones((1, order)), np.zeros((1, 1))), 1.0, method="zoh")
    a_discrete, b_discrete = discrete_matrices(order, theta)
    assert np.abs(a_discrete - a_bar).max() < 1e-12
    assert np.abs(b_discrete - b_bar[:, 0]).max() < 1e-12


@pytest.mark.parametrize(("order", "theta", "length"), [(4, 8.0, 1), (4, 8.0, 37), (60, 20.0, 100), (100, 1024.0, 1024)])
def test_impulse_response_equals_matrix_powers(order: int, theta: float, length: int):
    a_bar, b_bar = discrete_matrices(order, theta)
    h = impulse_response(order, theta, length)
    assert h.shape == (order, length)
    state = b_bar
    for t in range(length):
        assert np.abs(h[:, t] - state).max() < 1e-12
        state = a_bar @ state


def test_row_scale_is_the_deviation_under_white_noise():
    order, theta = 8, 64.0
    rows = np.sqrt((impulse_response(order, theta, 2000) ** 2).sum(1))
    assert rows == pytest.approx(row_scale(order, theta), rel=1e-9)
    assert rows[:2] == pytest.approx(np.sqrt([1 / theta, 3 / theta]), rel=0.05)


def test_constant_input_converges_to_the_first_coefficient():
    a_bar, b_bar = discrete_matrices(12, 20.0)
    assert np.linalg.solve(np.eye(12) - a_bar, b_bar) == pytest.approx(np.eye(12)[0], abs=1e-10)


@pytest.mark.parametrize(("order", "theta", "windows"), [(1, 10.0, 25), (10, 256.0, 5), (60, 40.0, 3), (250, 1024.0, 2)])
def test_impulse_response_vanishes_after_memory_tokens(order: int, theta: float, windows: int):
    tokens = memory_tokens(order, theta)
    assert theta < tokens <= windows * theta
    h = impulse_response(order, theta, tokens + round(4 * theta)) / row_scale(order, theta)[:, None]
    assert np.linalg.norm(h[:, tokens:]) < 1e-9 * np.linalg.norm(h)
