"""DeepSpeed against plain torch: every ZeRO stage, accumulation, bf16, exact resume, a loss that is not finite."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tasks
import torch
from gang import gang

from lmu_dist.train.engine import to_universal

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return tasks.plain_adam()


@pytest.mark.timeout(600)
def test_zero_0_to_3_on_two_workers_is_plain_adam(plain):
    results = gang(2, tasks.train_stages, [0, 1, 2, 3])
    assert plain[-1] < plain[0] - 0.1
    for stage, (losses, norms, weights) in results.items():
        assert np.abs(np.array(losses) - plain).max() < 1e-5, stage
        assert np.allclose(norms, results[0][1], rtol=1e-4), stage
        assert set(weights) == {name for name, _ in tasks.model().named_parameters()}
        for name, weight in weights.items():
            expected = results[0][2][name]
            # By norm: Adam turns rounding of a gradient near zero into a difference of one element.
            assert float((weight - expected).norm()) < 1e-5 * max(1.0, float(expected.norm())), (stage, name)


def test_accumulation_is_the_whole_batch(plain):
    for losses, _, _ in gang(2, tasks.train_stages, [1, 2], 1).values():
        assert np.abs(np.array(losses) - plain).max() < 1e-5


def test_head_in_blocks_is_the_whole_at_every_stage(plain):
    for stage, (losses, _, _) in gang(2, tasks.train_with_head_in_blocks, [1, 3]).items():
        assert np.abs(np.array(losses) - plain).max() < 1e-5, stage


def test_bf16_trains_like_fp32_at_every_stage(plain):
    for stage, losses in gang(2, tasks.bf16_stages).items():
        assert np.abs(np.array(losses) - plain).max() < 0.05, stage
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_bitwise_at_every_stage(world_size: int, tmp_path: Path):
    for stage, (uninterrupted, resumed) in gang(world_size, tasks.train_and_resume, [0, 1, 2, 3], str(tmp_path)).items():
        assert resumed == uninterrupted, stage


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_come_and_go(plain, stage: int, tmp_path: Path):
    """From 2 to 1, and on with 3, which do not divide the batch: the curve is that of one process all along."""
    two, one = (str(tmp_path / name) for name in ("two", "one"))
    losses = gang(2, tasks.train_and_save, stage, two, 0, 6)
    to_universal(tmp_path / "two", tmp_path / "two-universal")
    losses += gang(1, tasks.train_and_save, stage, one, 6, 12, f"{two}-universal", True)
    to_universal(tmp_path / "one", tmp_path / "one-universal")
    losses += gang(3, tasks.train_and_save, stage, str(tmp_path / "three"), 12, 20, f"{one}-universal", True)
    assert np.abs(np.array(losses) - plain).max() < 1e-5


def test_stage_0_needs_no_conversion(plain, tmp_path: Path):
    losses = gang(2, tasks.train_and_save, 0, str(tmp_path / "two"), 0, 10)
    losses += gang(1, tasks.train_and_save, 0, str(tmp_path / "one"), 10, 20, str(tmp_path / "two"))
    assert np.abs(np.array(losses) - plain).max() < 1e-5


@pytest.mark.parametrize("stage", [0, 2])
def test_a_loss_that_is_not_finite_moves_no_weight(stage: int):
    losses, same = gang(2, tasks.non_finite, stage)
    assert len(losses) == 1
    assert not math.isfinite(losses[0])
    assert same


@pytest.mark.parametrize("family", ["lmu", "lmu_attention", "transformer", "lstm"])
def test_golden_losses(family: str):
    """A refactor that moves these says why in CHANGELOG. To write them anew: python tests/train/test_engine.py"""
    expected = json.loads((GOLDEN / f"{family}.json").read_text())
    assert tasks.plain_adam(family) == pytest.approx(expected, abs=1e-4)


def test_evaluation_does_not_depend_on_the_workers(tmp_path: Path):
    n_rows = 7  # no multiple of anything
    rng = np.random.default_rng(1)
    rng.integers(0, tasks.VOCAB, n_rows * tasks.LENGTH + 1).astype("<u2").tofile(tmp_path / "v.bin")
    one = gang(1, tasks.evaluate_on, str(tmp_path / "v.bin"), n_rows)
    two = gang(2, tasks.evaluate_on, str(tmp_path / "v.bin"), n_rows, 2)
    assert one.loss_nats == pytest.approx(two.loss_nats, rel=1e-6)
    assert one.position_loss_nats == pytest.approx(two.position_loss_nats, rel=1e-5)
    assert one.standard_error_nats == pytest.approx(two.standard_error_nats, rel=1e-4)
    assert one.bits_per_byte == pytest.approx(one.loss_nats / math.log(2) / 2.0)
    # against the plain way
    tokens = torch.from_numpy(np.fromfile(tmp_path / "v.bin", "<u2").astype(np.int64))
    rows = torch.stack([tokens[i * tasks.LENGTH : (i + 1) * tasks.LENGTH + 1] for i in range(n_rows)])
    with torch.no_grad():
        losses = tasks.model()(rows[:, :-1], rows[:, 1:]).double()
    assert one.loss_nats == pytest.approx(losses.mean().item(), rel=1e-6)
    assert one.standard_error_nats == pytest.approx((losses.mean(1).std() / n_rows**0.5).item(), rel=1e-4)
    assert one.position_loss_nats == pytest.approx(losses.mean(0).tolist(), rel=1e-5)


if __name__ == "__main__":
    for name in ("lmu", "lmu_attention", "transformer", "lstm"):
        (GOLDEN / f"{name}.json").write_text(json.dumps(tasks.plain_adam(name)))
