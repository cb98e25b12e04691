"""Tests of batches: rows are a pure function of the step, the same for any number of workers, and each row once per epoch."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmu_dist.data.batches import Batch, TokenDataset, prefetch, row_indices, shuffle


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_shuffle_is_a_permutation(n: int, seed: int, epoch: int):
    assert sorted(shuffle(np.arange(n), n, seed, epoch)) == list(range(n))


def test_shuffle_is_uncorrelated_with_the_position():
    n = 10_000
    a, b = shuffle(np.arange(n), n, 0, 0), shuffle(np.arange(n), n, 0, 1)
    assert (a == b).sum() < 10
    assert (np.diff(a) == 1).sum() < 10
    assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.05


def test_shuffle_never_changes():
    """A changed permutation would silently give every resumed run other data."""
    assert shuffle(np.arange(8), 1000, 42, 3).tolist() == [892, 318, 960, 443, 852, 579, 356, 234]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 5, 6, 40])
def test_global_batch_does_not_depend_on_world_size(world_size: int, step: int):
    global_batch = row_indices(100, 7, step, 16)
    shares = [row_indices(100, 7, step, 16, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(shares).tolist() == global_batch.tolist()


def test_every_row_once_per_epoch():
    indices = np.concatenate([row_indices(100, 7, step, 16) for step in range(50)])
    assert sorted(indices[:100]) == list(range(100))
    assert sorted(indices[100:200]) == list(range(100))
    assert indices[:100].tolist() != indices[100:200].tolist()


def test_neighbouring_rows_share_a_token(tmp_path):
    np.arange(26, dtype="<u2").tofile(tmp_path / "s.bin")
    rows = TokenDataset(tmp_path / "s.bin", "<u2", 5)
    assert len(rows) == 5
    batch = rows.batch(np.array([0, 4]))
    assert batch.inputs.tolist() == [[0, 1, 2, 3, 4], [20, 21, 22, 23, 24]]
    assert batch.targets.tolist() == [[1, 2, 3, 4, 5], [21, 22, 23, 24, 25]]
    (tmp_path / "empty.bin").touch()
    assert len(TokenDataset(tmp_path / "empty.bin", "<u2", 5)) == 0


def batch_at(step: int) -> Batch:
    if step == 5:
        raise OSError("the disk is gone")
    return Batch(torch.full((1, 2), step), torch.full((1, 2), step))


def test_prefetch_keeps_the_order_reads_one_batch_ahead_and_raises_errors_when_they_are_due():
    read, cpu = list[int](), torch.device("cpu")
    batches = prefetch(lambda step: (read.append(step), batch_at(step))[1], 2, 9, cpu)
    assert [int(next(batches).inputs[0, 0]) for _ in range(3)] == [2, 3, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert read == [2, 3, 4, 5]
    assert [int(b.inputs[0, 0]) for b in prefetch(batch_at, 0, 3, cpu)] == [0, 1, 2]


def test_prefetch_leaves_no_thread():
    batches = prefetch(batch_at, 0, 5, torch.device("cpu"))
    next(batches)
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
