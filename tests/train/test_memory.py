"""Compares the measured memory of workers at every ZeRO stage with the estimate of `plan`, on a small model."""

import memory
import pytest
from spawn_ranks import spawn_ranks


@pytest.mark.timeout(600)
@pytest.mark.parametrize("n_workers", [1, 2])
def test_measured_memory_equals_the_estimate_of_plan(n_workers: int):
    rows = spawn_ranks(n_workers, memory.measure, memory.STAGES, ("fp32", "bf16"), "transformer", 400_000)
    assert [row.zero_stage for row in rows] == [*memory.STAGES, *memory.STAGES]
    for row in rows:
        assert row.state_ratio == pytest.approx(1, abs=0.1), row
        assert row.peak_ratio == pytest.approx(1, abs=0.1), row
        assert row.gradients
