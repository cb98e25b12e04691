"""What workers hold at every ZeRO stage against what `plan` says; the benchmark on a small model."""

import memory
import pytest
from gang import gang


@pytest.mark.timeout(600)
@pytest.mark.parametrize("n_workers", [1, 2])
def test_memory_is_what_plan_says(n_workers: int):
    rows = gang(n_workers, memory.measure, memory.STAGES, ("fp32", "bf16"), "transformer", 400_000)
    assert [row.zero_stage for row in rows] == [*memory.STAGES, *memory.STAGES]
    for row in rows:
        assert row.state_ratio == pytest.approx(1, abs=0.1), row
        assert row.peak_ratio == pytest.approx(1, abs=0.1), row
        assert row.gradients
