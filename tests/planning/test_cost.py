"""Plans: FLOPs of shared trunks are counted once; times come from the calibration; memory by ZeRO stage."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lmu_dist.cli import main
from lmu_dist.config import Config, ConfigError, parse, with_settings
from lmu_dist.data.manifest import Manifest
from lmu_dist.models import accounting
from lmu_dist.planning.cost import (
    StepTime,
    executed_step_flops,
    plan,
    read_calibration,
    step_seconds,
    step_settings,
    write_calibration,
)
from lmu_dist.planning.grid import GridCell, grid
from lmu_dist.planning.plan_notes import epochs_of, plan_notes

JOBS = Path(__file__).parents[2] / "jobs"


def make_config(tmp_path: Path, schedule: str = "wsd") -> Config:
    return parse(
        {
            "storage": str(tmp_path),
            "data": {"tokenizer": {"vocab_tokens": 400}},
            "train": {"schedule": schedule, "warmup_tokens": 50_000, "decay_share": 0.25},
            "ladder": {"families": ["lmu", "lstm"], "n_params": [3000, 30_000], "tokens": [500_000, 1_000_000, 2_000_000]},
        }
    )


def step_time(cell: GridCell, seconds: float) -> StepTime:
    train, workers = cell.config.train, cell.config.cluster.n_workers
    return StepTime(
        step_settings(cell),
        "test",
        seconds,
        train.batch_tokens * accounting.flops(cell.shape).training / workers / seconds,
        accounting.parameters(cell.shape).non_embedding,
    )


def test_shared_steps_are_counted_once(tmp_path: Path):
    wsd, cosine = plan(make_config(tmp_path)), plan(make_config(tmp_path, "cosine"))
    assert cosine.saved_share == 0
    d_model = wsd.cells[0].d_model
    steps = {
        cell.tokens: (cell.steps, cell.shared_steps) for cell in wsd.cells if cell.family == "lmu" and cell.n_params < 4000
    }
    assert steps == {500_000: (245, 0), 1_000_000: (489, 184), 2_000_000: (977, 367)}
    for cell in (cell for cell in wsd.cells if (cell.family, cell.d_model) == ("lmu", d_model)):
        flops_per_step = cell.flops / (cell.steps - cell.shared_steps)
        [independent] = [
            c for c in cosine.cells if (c.family, c.n_params, c.tokens) == (cell.family, cell.n_params, cell.tokens)
        ]
        assert independent.flops == pytest.approx(flops_per_step * cell.steps)
    assert wsd.saved_share == pytest.approx((184 + 367) / (245 + 489 + 977), rel=0.02)
    assert wsd.flops == pytest.approx(sum(cell.flops for cell in wsd.cells))


def test_time_and_price_come_from_the_calibration(tmp_path: Path):
    config = with_settings(make_config(tmp_path), {"plan.price_per_worker_hour": 3.0})
    assert plan(config).worker_seconds is None
    cells, _ = grid(config, 400)
    write_calibration(tmp_path, [step_time(cell, 0.1) for cell in cells])
    write_calibration(tmp_path, [step_time(cell, 0.2) for cell in cells])  # replaces the first
    costs = plan(config)
    assert {cell.step_seconds for cell in costs.cells} == {0.2}
    own_steps = sum(cell.steps - cell.shared_steps for cell in costs.cells)
    assert costs.worker_seconds == pytest.approx(0.2 * own_steps * 2)
    assert costs.price == pytest.approx(costs.worker_seconds / 3600 * 3)
    # every cell has two workers: two slots run one trunk at a time, four slots run two
    assert costs.wall_seconds == pytest.approx(0.2 * own_steps)
    assert plan(with_settings(config, {"plan.n_slots": 4})).wall_seconds == pytest.approx(0.1 * own_steps)
    given = plan(with_settings(config, {"plan.flops_per_second": 1e9}))
    assert {cell.step_seconds for cell in given.cells} != {0.2}
    other = plan(with_settings(config, {"cluster.micro_batch_rows": 2}))  # not measured: interpolated
    assert other.cells[0].step_seconds == pytest.approx(0.2)


def test_step_time_is_interpolated_between_measured_sizes(tmp_path: Path):
    config = make_config(tmp_path)
    cells, _ = grid(with_settings(config, {"ladder.n_params": [3000, 10_000, 30_000, 300_000]}), 400)
    by_size = {(c.shape.family, c.config.model.n_params): c for c in cells}
    known = [step_time(by_size["lmu", 3000], 0.01), step_time(by_size["lmu", 30_000], 0.05)]
    between = step_seconds(by_size["lmu", 10_000], known)
    assert between is not None
    assert 0.01 < between < 0.05
    beyond = step_seconds(by_size["lmu", 300_000], known)
    large, small = (executed_step_flops(step_settings(by_size["lmu", n])) for n in (300_000, 30_000))
    assert beyond == pytest.approx(0.05 * large / small)
    assert step_seconds(by_size["lstm", 3000], known) is None


def test_plan_says_which_budgets_repeat_the_corpus_and_what_recipes_and_steps_do(tmp_path: Path):
    recipe = {"train.recipe": "family", "train.weight_decay": 0.1}
    steps = {"ladder.learning_rate": {"value": 0.01, "token_exponent": -0.5, "at_tokens": 500_000}}
    config = with_settings(make_config(tmp_path), {"ladder.n_params": [3000], **steps})
    cells, _ = grid(config, 400)
    facts = {"bytes": 1, "documents": 1, "sha256": "0" * 64}
    splits: Any = {"train": {"tokens": 800_001, **facts}, "validation": {"tokens": 10_000, **facts}}
    digests = ("0" * 64, splits, {}, "0" * 64)
    corpus = Manifest(2, "files", "", 400, 0, "<u2", *digests)
    assert epochs_of(cells[0], corpus) == pytest.approx(0.628, abs=0.001)  # 245 steps of 2,048 tokens
    rates, epochs = plan_notes(config, cells, corpus)
    assert rates.startswith("rate: where the decay of a smaller budget starts")
    assert "the corpus has 800,000 training tokens" in epochs
    assert epochs.endswith("their runs: 1,000,000 (1.25 epochs), 2,000,000 (2.5 epochs)")
    [unknown] = plan(with_settings(make_config(tmp_path), {"ladder.n_params": [3000]})).notes
    assert unknown.startswith("epochs: unknown until the corpus is prepared")
    enough = replace(corpus, splits=splits | {"train": {"tokens": 10**8, **facts}})
    of_lmu, of_lstm = plan_notes(with_settings(make_config(tmp_path), recipe), cells[:1], enough)
    assert of_lmu.startswith(
        "recipe of lmu: beta1 0.9, beta2 0.999, eps 1e-08; set by the configuration: weight_decay 0.1; from Kaplan"
    )
    assert of_lstm.startswith("recipe of lstm: ")


def test_time_follows_executed_flops(tmp_path: Path):
    overrides = {"ladder.n_params": [30_000], "plan.flops_per_second": 1e9, "cluster.micro_batch_rows": 2}
    config = with_settings(make_config(tmp_path), overrides)
    on_cpu, on_gpu, again = (
        next(cell for cell in plan(with_settings(config, changed)).cells if cell.family == "lmu")
        for changed in ({}, {"cluster.gpus_per_worker": 1}, {"cluster.activation_checkpointing": True})
    )
    assert on_cpu.flops == on_gpu.flops == again.flops  # counted: the same on any hardware
    assert on_cpu.executed_flops < again.executed_flops < on_gpu.executed_flops
    for cell in (on_cpu, on_gpu, again):
        assert cell.seconds == pytest.approx(cell.executed_flops / cell.n_workers / 1e9)
    whole = plan(config)
    assert whole.totals()["executed_flops"] == pytest.approx(sum(cell.executed_flops for cell in whole.cells))


def test_calibration_of_an_earlier_version_predicts_times(tmp_path: Path):
    """It has counted FLOP/s and no settings that were added later; a speed comes from its seconds and its settings."""
    config = with_settings(make_config(tmp_path), {"ladder.n_params": [10_000, 30_000], "ladder.families": ["lmu"]})
    cells, _ = grid(config, 400)
    small, large = cells[0], cells[-1]
    stored = asdict(step_time(small, 0.1)) | {"worker_flops_per_second": 1.0}
    (tmp_path / "calibration.json").write_text(json.dumps([stored]))
    expected = 0.1 * executed_step_flops(step_settings(large)) / executed_step_flops(step_settings(small))
    assert step_seconds(large, read_calibration(tmp_path)) == pytest.approx(expected)


def test_memory_by_zero_stage_and_smallest_stage_that_fits(tmp_path: Path):
    config = with_settings(
        make_config(tmp_path), {"ladder.n_params": [10_000_000], "train.batch_tokens": 2048, "cluster.n_workers": 8}
    )
    cell = plan(config).cells[-1]
    assert list(cell.memory_bytes) == sorted(cell.memory_bytes, reverse=True)
    tight = with_settings(config, {"plan.worker_memory_bytes": (cell.memory_bytes[2] + cell.memory_bytes[1]) / 2})
    assert plan(tight).cells[-1].smallest_stage == 2
    assert plan(with_settings(config, {"plan.worker_memory_bytes": 1000.0})).cells[-1].smallest_stage is None


@pytest.mark.parametrize("job", sorted(JOBS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_job_can_be_planned_in_seconds_and_fits_in_memory(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    began = time.process_time()
    assert main(["plan", str(job), f"storage={tmp_path}", "--json"]) == 0
    assert time.process_time() - began < 15  # orders6, of 112 cells from N = 1e3 to 1e9: 8 s of one core
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert len(cells) == 112 or job.stem != "orders6"
    for cell in cells:
        assert cell["smallest_stage"] is not None
        assert cell["smallest_stage"] <= cell["zero_stage"]


def test_plan_prints_the_number_of_cells_and_the_assumed_factor(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["plan", str(JOBS / "cpu_ladder.yaml"), f"storage={tmp_path}", "ladder.families=[lmu, transformer]"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "56 cells" in output
    assert "token-efficiency factor, assumed 10" in output


def test_ways_to_save_memory_are_planned(tmp_path: Path):
    """On a GPU; on a CPU the offloaded state is in the same memory. Steps without them match calibrations made before."""
    settings = {"ladder.families": ["transformer"], "ladder.n_params": [10_000_000], "cluster.gpus_per_worker": 1}
    settings |= {"model.n_blocks": 8, "cluster.micro_batch_rows": 8, "train.precision": "bf16"}

    def memory(**cluster: object) -> tuple[float, ...]:
        changed = settings | {f"cluster.{key}": value for key, value in cluster.items()}
        return plan(with_settings(make_config(tmp_path), changed)).cells[0].memory_bytes

    plain, checkpointed, offloaded = memory(), memory(activation_checkpointing=True), memory(offload="optimizer")
    assert all(a < b for a, b in zip(checkpointed, plain, strict=True))
    assert offloaded[0] == plain[0]
    assert all(a < b for a, b in zip(offloaded[1:], plain[1:], strict=True))
    assert memory(gpus_per_worker=0, offload="optimizer") == memory(gpus_per_worker=0)

    def host_bytes(**cluster: object) -> float:
        changed = settings | {f"cluster.{key}": value for key, value in cluster.items()}
        return plan(with_settings(make_config(tmp_path), changed)).cells[0].host_bytes

    assert host_bytes() == host_bytes(gpus_per_worker=0, offload="optimizer") == 0
    share = 10_000_000 / 2  # of two workers, without embeddings
    assert host_bytes(offload="optimizer") > 12 * share  # master weights and two moments in float32
    added = {"activation_checkpointing", "offload", "gradient_precision"}
    default, _ = grid(make_config(tmp_path), 400)
    assert not added & set(step_settings(default[0]))
    saving, _ = grid(
        with_settings(
            make_config(tmp_path),
            {"cluster.offload": "optimizer", "cluster.activation_checkpointing": True, "train.precision": "bf16"},
        ),
        400,
    )
    assert added <= set(step_settings(saving[0]))


def test_offload_needs_a_sharded_optimizer(tmp_path: Path):
    with pytest.raises(ConfigError, match="needs zero_stage 1, 2 or 3"):
        with_settings(make_config(tmp_path), {"cluster.offload": "optimizer", "cluster.zero_stage": 0})
