"""The frozen memory against closed forms, scipy's discretisation and Lyapunov equation; and its cache on disk."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from scipy.signal import cont2discrete

from lmu_dist.models.mixers.lmu import legendre
from lmu_dist.models.mixers.lmu.legendre import (
    chunk_powers,
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


@pytest.mark.parametrize(("order", "theta"), [(1, 7.0), (12, 20.0), (24, 16.0), (60, 40.0), (250, 1024.0), (7, 9000.0)])
def test_row_scale_solves_the_lyapunov_equation(order: int, theta: float):
    a_bar, b_bar = discrete_matrices(order, theta)
    gramian = solve_discrete_lyapunov(a_bar, np.outer(b_bar, b_bar))
    assert row_scale(order, theta) == pytest.approx(np.sqrt(np.diag(gramian)), rel=1e-11)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 32])
def test_chunk_powers(chunk: int):
    a_bar, scale = discrete_matrices(20, 64.0)[0], row_scale(20, 64.0)
    first, steps, last = chunk_powers(20, 64.0, chunk, "f8")
    products = [*first, *(step @ power for step in steps for power in first)][:chunk]
    for i, power in enumerate(products):
        expected = np.linalg.matrix_power(a_bar, i + 1) / scale[:, None] * scale
        assert np.abs(power - expected).max() < 1e-13
    assert np.abs(last - products[-1]).max() < 1e-13


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, empty. Orders are large from 20 on."""
    monkeypatch.setattr(legendre, "_cache_folder", lambda: tmp_path / legendre.CACHE)
    monkeypatch.setattr(legendre, "SMALLEST_ORDER_ON_DISK", 20)
    forget()
    return tmp_path / legendre.CACHE


def forget() -> None:
    """Forgets what this process has computed, as a new process would have."""
    legendre.legendre_memory.cache_clear()


def results(order: int, theta: float) -> list[np.ndarray]:
    memory = legendre.legendre_memory(order, theta)
    arrays = [memory.a_bar, memory.b_bar, memory.response, memory.row_scale, np.array(memory.memory_tokens)]
    return [*arrays, *chunk_powers(order, theta, 6, "f4")]


def test_memory_is_read_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch):
    computed = results(21, 37.5)
    results(19, 37.5)  # small: not kept
    assert len(list(cache.iterdir())) == 2
    assert not list(cache.glob("*.partial"))
    forget()
    monkeypatch.setattr(torch.linalg, "matrix_exp", None)
    for got, expected in zip(results(21, 37.5), computed, strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other", "read-only"])
def test_damaged_or_unwritable_cache_is_ignored(cache: Path, damage: str):
    computed = results(21, 37.5)
    forget()
    for path in cache.iterdir():
        content = path.read_bytes()
        damaged = {
            "truncate": content[: len(content) // 2],
            "flip": content[:-500] + bytes([content[-500] ^ 1]) + content[-499:],
            "empty": b"",
            "other": b"PK\x03\x04 no array",
        }
        if damage == "read-only":
            path.unlink()
        else:
            path.write_bytes(damaged[damage])
    if damage == "read-only":
        cache.rmdir()
        cache.write_text("a file in place of the folder")
    for got, expected in zip(results(21, 37.5), computed, strict=True):
        assert np.array_equal(got, expected)
    if damage != "read-only":  # they have been replaced
        forget()
        before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
        results(21, 37.5)
        assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


MEASURE = """
import time
import numpy as np
from lmu_dist.models.mixers.lmu import legendre
x = np.random.default_rng(0).standard_normal((1020, 1020))
def product_seconds():
    x @ x
    start = time.process_time()
    x @ x
    return time.process_time() - start
before, start = product_seconds(), time.process_time()
legendre.legendre_memory(1020, 1024.0)
legendre.chunk_powers(1020, 1024.0, 32, "f4")
seconds = time.process_time() - start
print(seconds, max(before, product_seconds()))
"""


def test_order_of_a_thousand_takes_as_long_as_forty_products(tmp_path: Path):
    """Of matrices of that size; the second process reads the cache, in the time of one. Times are those of the CPU, which other
    processes do not change as much, and the bounds are three and six times these."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    cold, warm = (
        [float(word) for word in subprocess.check_output([sys.executable, "-c", MEASURE], env=environment, text=True).split()]
        for _ in range(2)
    )
    assert cold[0] < 3 * 40 * cold[1]
    assert warm[0] < 6 * warm[1]
    assert warm[0] < cold[0] / 5


def test_constant_input_converges_to_the_first_coefficient():
    a_bar, b_bar = discrete_matrices(12, 20.0)
    assert np.linalg.solve(np.eye(12) - a_bar, b_bar) == pytest.approx(np.eye(12)[0], abs=1e-10)


@pytest.mark.parametrize(("order", "theta", "windows"), [(1, 10.0, 25), (10, 256.0, 5), (60, 40.0, 3), (250, 1024.0, 2)])
def test_impulse_response_vanishes_after_memory_tokens(order: int, theta: float, windows: int):
    tokens = memory_tokens(order, theta)
    assert theta < tokens <= windows * theta
    h = impulse_response(order, theta, tokens + round(4 * theta)) / row_scale(order, theta)[:, None]
    assert np.linalg.norm(h[:, tokens:]) < 1e-9 * np.linalg.norm(h)
