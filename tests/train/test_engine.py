"""Tests of the DeepSpeed engine against plain torch: ZeRO stages, accumulation, bf16, exact resume, non-finite losses."""

import math
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import step_tasks
import tasks
import torch
from spawn_ranks import spawn_ranks

from lmu_dist.data.batches import TokenDataset
from lmu_dist.train.engine import peak_bytes, reset_peak_bytes
from lmu_dist.train.evaluate import evaluated_rows


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


def test_learning_rates_by_role_and_width_equal_plain_adam_at_every_stage(plain):
    by_role = tasks.plain_adam(n_steps=8, rates=tasks.ROLE_RATES)
    by_width = tasks.plain_adam(n_steps=8, rates=tasks.ROLE_RATES, base_n_params=tasks.BASE_N_PARAMS)
    assert abs(by_role[-1] - plain[7]) > 0.01
    assert abs(by_role[-1] - by_width[-1]) > 0.01
    cases = [*((stage, "fp32") for stage in range(4)), (0, "bf16"), (2, "bf16")]
    for (stage, precision), losses in spawn_ranks(1, tasks.train_by_role, cases, 8).items():
        assert np.abs(np.array(losses) - by_width).max() < (1e-5 if precision == "fp32" else 0.05), (stage, precision)


def test_all_families_train_at_zero_stages_and_in_bf16():
    """Stage 3 gathers the weights of each module for its own forward pass: a module must not read those of another one. Every
    family is at stage 3, and every stage is met in both precisions by some of them.
    """
    others = cycle([(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (0, "fp32"), (1, "fp32"), (2, "fp32")])
    cases = [(name, *case) for name, other in zip(tasks.MODELS, others, strict=False) for case in ((3, "fp32"), other)]
    results, plain = spawn_ranks(2, tasks.train_models, cases), {name: tasks.plain_adam(name, 2) for name in tasks.MODELS}
    assert {case[1:] for case in results} == {(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")}
    for (name, *case), losses in results.items():
        assert abs(plain[name][1] - plain[name][0]) > 1e-3, name  # of the step
        assert np.abs(np.array(losses) - plain[name]).max() < (1e-5 if case[1] == "fp32" else 0.05), (name, case)


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


def test_branches_of_a_stepped_trunk_equal_runs_from_step_0_bitwise(tmp_path: Path):
    results = spawn_ranks(1, tasks.train_stepped_trunk, str(tmp_path))
    for n_steps, (branch, from_step_0) in results.items():
        assert branch == from_step_0, n_steps
    assert [len(branch) for branch, _ in results.values()] == [10, 20, 40]
    assert results[10][0][9] != results[20][0][9]  # in its decay


@pytest.mark.timeout(600)
def test_changing_the_number_of_workers_keeps_state_and_loss_curve(plain, tmp_path: Path):
    """4 workers, then 2, then 3, which do not divide the batch: weights and Adam's state go on bit for bit."""
    four = spawn_ranks(4, tasks.train_elastically, str(tmp_path), (), 0, 6)
    two = spawn_ranks(2, tasks.train_elastically, str(tmp_path), (4,), 6, 12)
    three = spawn_ranks(3, tasks.train_elastically, str(tmp_path), (4, 2), 12, 20)
    for case in tasks.ELASTIC_CASES:
        for loaded, saved in (
            (two[case].loaded[4], four[case].last),
            (three[case].loaded[4], four[case].last),
            (three[case].loaded[2], two[case].last),
        ):
            assert loaded.keys() == saved.keys()
            different = [key for key in saved if not same(loaded[key], saved[key])]
            assert not different, (case, different)
        losses = np.array(four[case].losses + two[case].losses + three[case].losses)
        _, precision, weight_decay = case
        if not weight_decay:
            assert np.abs(losses - plain).max() < (1e-5 if precision == "fp32" else 0.05), case


def same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize("stage", [0, 2])
def test_training_ends_at_a_loss_that_is_not_finite(stage: int):
    losses, norms = spawn_ranks(2, tasks.non_finite, stage)
    assert len(losses) == 1
    assert not math.isfinite(losses[0])
    assert math.isnan(norms[0])


def test_a_step_reads_from_the_device_once():
    """Every other read on the CPU would make a GPU wait. DeepSpeed's own are listed, so that a new version shows new ones."""
    for (stage, precision), reads in spawn_ranks(1, step_tasks.host_reads, [0, 1, 2, 3], ["fp32", "bf16"]).items():
        assert {k: n for k, n in reads.items() if k.startswith("lmu_dist")} == {"lmu_dist: step": 1}, (stage, precision)
        by_deepspeed = {k.removeprefix("deepspeed: "): n for k, n in reads.items() if k.startswith("deepspeed")}
        if stage:
            assert by_deepspeed == {"is_invalid_grad_norm": 2 if precision == "fp32" and stage < 3 else 1}, (stage, precision)
        else:  # in bf16 it reads the norm of each group of parameters
            assert set(by_deepspeed) == ({"get_weight_norm"} if precision == "bf16" else set()), precision


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_synchronizes_a_gpu_once():
    files = [Path(name).parts for name in spawn_ranks(1, step_tasks.host_reads_on_gpu, backend="nccl")]
    assert sum("lmu_dist" in parts for parts in files) == 1
    assert sum("deepspeed" in parts for parts in files) <= 1


def test_bf16_gradients_are_summed_in_float32():
    exact = np.mean(step_tasks.SUMMANDS)
    for case, gradient in spawn_ranks(2, step_tasks.sums_of_gradients).items():
        _, precision, _ = case
        assert gradient == pytest.approx(exact if precision == "fp32" else 1024 / 64, rel=1e-3), case


def test_ways_to_save_memory_do_not_change_the_steps():
    """Recomputed blocks give the same bits at every ZeRO stage. For an offloaded optimizer DeepSpeed sums the gradient norm
    in another order, and so clips by another last bit. The memory of a closed engine is free.
    """
    results = spawn_ranks(2, step_tasks.save_memory, [0, 1, 3])
    for (stage, way), steps in results.items():
        assert np.allclose(steps, results[stage, "none"], rtol=1e-6), (stage, way)
        assert way == "offload" or steps == results[stage, "none"], (stage, way)


def test_engines_do_not_import_a_compiler():
    """DeepSpeed's Muon would, at every stage from 1 on: it takes time and memory of every worker."""
    assert spawn_ranks(1, step_tasks.imported_compilers, [1, 3]) == set()


def test_peak_memory_can_be_reset():
    cpu, before = torch.device("cpu"), torch.ones(50_000_000, dtype=torch.uint8)
    del before
    reset_peak_bytes(cpu)
    low = peak_bytes(cpu)
    block = torch.ones(100_000_000, dtype=torch.uint8)
    assert block.sum() > 0
    assert peak_bytes(cpu) > low + 90_000_000
    del block
    reset_peak_bytes(cpu)
    assert peak_bytes(cpu) < low + 50_000_000


def test_evaluated_rows_are_spread_over_the_split(tmp_path: Path):
    np.arange(101 * 8 + 1).astype("<u2").tofile(tmp_path / "v.bin")
    rows = TokenDataset(tmp_path / "v.bin", "<u2", 8)
    assert list(evaluated_rows(rows, 4 * 8 + 7)) == [0, 25, 50, 75]
    assert list(evaluated_rows(rows, 7)) == [0]
    assert list(evaluated_rows(rows, 10**6)) == list(range(101))


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
