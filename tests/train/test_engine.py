"""Tests of the DeepSpeed engine against plain torch: ZeRO stages, accumulation, bf16, exact resume, non-finite losses."""

import math
from pathlib import Path

import numpy as np
import pytest
import tasks
import torch
from spawn_ranks import spawn_ranks

from lmu_dist.train.engine import to_universal


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return tasks.plain_adam()


@pytest.mark.timeout(600)
def test_zero_stages_on_two_workers_equal_plain_adam(plain):
    results = spawn_ranks(2, tasks.train_stages, [0, 1, 2, 3])
    assert plain[-1] < plain[0] - 0.1
    for stage, (losses, norms, weights) in results.items():
        assert np.abs(np.array(losses) - plain).max() < 1e-5, stage
        assert np.allclose(norms, results[0][1], rtol=1e-4), stage
        assert set(weights) == {name for name, _ in tasks.model().named_parameters()}
        for name, weight in weights.items():
            expected = results[0][2][name]
            # By norm: for gradients near zero Adam amplifies rounding, so single elements may differ.
            assert float((weight - expected).norm()) < 1e-5 * max(1.0, float(expected.norm())), (stage, name)


def test_gradient_accumulation_equals_the_full_batch(plain):
    for losses, _, _ in spawn_ranks(2, tasks.train_stages, [1, 2], 1).values():
        assert np.abs(np.array(losses) - plain).max() < 1e-5


def test_blocked_head_equals_the_plain_head_at_every_stage(plain):
    for stage, (losses, _, _) in spawn_ranks(2, tasks.train_with_blocked_head, [1, 3]).items():
        assert np.abs(np.array(losses) - plain).max() < 1e-5, stage


def test_bf16_losses_are_close_to_fp32_at_every_stage(plain):
    for stage, losses in spawn_ranks(2, tasks.bf16_stages).items():
        assert np.abs(np.array(losses) - plain).max() < 0.05, stage
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_bitwise_at_every_stage(world_size: int, tmp_path: Path):
    for stage, (uninterrupted, resumed) in spawn_ranks(world_size, tasks.train_and_resume, [0, 1, 2, 3], str(tmp_path)).items():
        assert resumed == uninterrupted, stage


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_changing_the_number_of_workers_keeps_the_loss_curve(plain, stage: int, tmp_path: Path):
    """2 workers, then 1, then 3, which do not divide the batch: the losses stay those of one process."""
    two, one = (str(tmp_path / name) for name in ("two", "one"))
    losses = spawn_ranks(2, tasks.train_and_save, stage, two, 0, 6)
    to_universal(tmp_path / "two", tmp_path / "two-universal")
    losses += spawn_ranks(1, tasks.train_and_save, stage, one, 6, 12, f"{two}-universal", True)
    to_universal(tmp_path / "one", tmp_path / "one-universal")
    losses += spawn_ranks(3, tasks.train_and_save, stage, str(tmp_path / "three"), 12, 20, f"{one}-universal", True)
    assert np.abs(np.array(losses) - plain).max() < 1e-5


def test_stage_0_needs_no_conversion(plain, tmp_path: Path):
    losses = spawn_ranks(2, tasks.train_and_save, 0, str(tmp_path / "two"), 0, 10)
    losses += spawn_ranks(1, tasks.train_and_save, 0, str(tmp_path / "one"), 10, 20, str(tmp_path / "two"))
    assert np.abs(np.array(losses) - plain).max() < 1e-5


@pytest.mark.parametrize("stage", [0, 2])
def test_non_finite_loss_changes_no_weight(stage: int):
    losses, same = spawn_ranks(2, tasks.non_finite, stage)
    assert len(losses) == 1
    assert not math.isfinite(losses[0])
    assert same


def test_evaluation_does_not_depend_on_world_size(tmp_path: Path):
    n_rows = 7  # not a multiple of world size or micro-batch
    rng = np.random.default_rng(1)
    rng.integers(0, tasks.VOCAB, n_rows * tasks.LENGTH + 1).astype("<u2").tofile(tmp_path / "v.bin")
    one = spawn_ranks(1, tasks.evaluate_on, str(tmp_path / "v.bin"), n_rows)
    two = spawn_ranks(2, tasks.evaluate_on, str(tmp_path / "v.bin"), n_rows, 2)
    assert one.loss_nats == pytest.approx(two.loss_nats, rel=1e-6)
    assert one.position_loss_nats == pytest.approx(two.position_loss_nats, rel=1e-5)
    assert one.standard_error_nats == pytest.approx(two.standard_error_nats, rel=1e-4)
    assert one.bits_per_byte == pytest.approx(one.loss_nats / math.log(2) / 2.0)
    # compared with plain torch
    tokens = torch.from_numpy(np.fromfile(tmp_path / "v.bin", "<u2").astype(np.int64))
    rows = torch.stack([tokens[i * tasks.LENGTH : (i + 1) * tasks.LENGTH + 1] for i in range(n_rows)])
    with torch.no_grad():
        losses = tasks.model()(rows[:, :-1], rows[:, 1:]).double()
    assert one.loss_nats == pytest.approx(losses.mean().item(), rel=1e-6)
    assert one.standard_error_nats == pytest.approx((losses.mean(1).std() / n_rows**0.5).item(), rel=1e-4)
    assert one.position_loss_nats == pytest.approx(losses.mean(0).tolist(), rel=1e-5)
