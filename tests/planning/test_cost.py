"""Plans: counts equal to accounting's, shared trunks charged once, time from what was measured."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmu_dist.cli import main
from lmu_dist.config import Config, parse, with_settings
from lmu_dist.models import accounting
from lmu_dist.planning.cost import Measured, plan, step_of, step_seconds, write_calibration
from lmu_dist.planning.grid import Planned, grid

JOBS = Path(__file__).parents[2] / "jobs"


def configured(tmp_path: Path, schedule: str = "wsd") -> Config:
    return parse(
        {
            "storage": str(tmp_path),
            "data": {"tokenizer": {"vocab_tokens": 400}},
            "train": {"schedule": schedule, "warmup_tokens": 50_000, "decay_share": 0.25},
            "ladder": {"families": ["lmu", "lstm"], "n_params": [3000, 30_000], "tokens": [500_000, 1_000_000, 2_000_000]},
        }
    )


def measured(cell: Planned, seconds: float) -> Measured:
    train, workers = cell.config.train, cell.config.cluster.n_workers
    return Measured(
        step_of(cell),
        "test",
        seconds,
        train.batch_tokens * accounting.flops(cell.shape).training / workers / seconds,
        accounting.parameters(cell.shape).non_embedding,
    )


def test_shared_steps_are_charged_once(tmp_path: Path):
    wsd, cosine = plan(configured(tmp_path)), plan(configured(tmp_path, "cosine"))
    assert cosine.saved_share == 0
    lines = [line for line in wsd.lines if (line.family, line.d_model) == ("lmu", wsd.lines[0].d_model)]
    steps = {
        line.tokens: (line.steps, line.shared_steps) for line in wsd.lines if line.family == "lmu" and line.n_params < 4000
    }
    assert steps == {500_000: (245, 0), 1_000_000: (489, 184), 2_000_000: (977, 367)}
    for line in lines:
        per_step = line.flops / (line.steps - line.shared_steps)
        alone = next(c for c in cosine.lines if (c.family, c.n_params, c.tokens) == (line.family, line.n_params, line.tokens))
        assert alone.flops == pytest.approx(per_step * line.steps)
    assert wsd.saved_share == pytest.approx((184 + 367) / (245 + 489 + 977), rel=0.02)
    assert wsd.flops == pytest.approx(sum(line.flops for line in wsd.lines))


def test_time_and_price_come_from_what_was_measured(tmp_path: Path):
    config = with_settings(configured(tmp_path), {"plan.price_per_worker_hour": 3.0})
    assert plan(config).worker_seconds is None
    cells, _ = grid(config, 400)
    write_calibration(tmp_path, [measured(cell, 0.1) for cell in cells])
    write_calibration(tmp_path, [measured(cell, 0.2) for cell in cells])  # the later one holds
    found = plan(config)
    assert {line.step_seconds for line in found.lines} == {0.2}
    own_steps = sum(line.steps - line.shared_steps for line in found.lines)
    assert found.worker_seconds == pytest.approx(0.2 * own_steps * 2)
    assert found.price == pytest.approx(found.worker_seconds / 3600 * 3)
    # two workers each: one trunk at a time on two slots, two on four
    assert found.wall_seconds == pytest.approx(0.2 * own_steps)
    assert plan(with_settings(config, {"plan.n_slots": 4})).wall_seconds == pytest.approx(0.1 * own_steps)
    given = plan(with_settings(config, {"plan.flops_per_second": 1e9}))
    assert {line.step_seconds for line in given.lines} != {0.2}
    other = plan(with_settings(config, {"cluster.micro_batch_rows": 2}))  # measured with whole batches, so from the speeds
    assert other.lines[0].step_seconds == pytest.approx(0.2)


def test_sizes_between_the_measured_ones_are_interpolated(tmp_path: Path):
    config = configured(tmp_path)
    cells, _ = grid(with_settings(config, {"ladder.n_params": [3000, 10_000, 30_000, 300_000]}), 400)
    by_size = {(c.shape.family, c.config.model.n_params): c for c in cells}
    known = [measured(by_size["lmu", 3000], 0.01), measured(by_size["lmu", 30_000], 0.05)]
    between = step_seconds(by_size["lmu", 10_000], known)
    assert between is not None
    assert 0.01 < between < 0.05
    beyond = step_seconds(by_size["lmu", 300_000], known)
    flops = accounting.flops(by_size["lmu", 300_000].shape).training / accounting.flops(by_size["lmu", 30_000].shape).training
    assert beyond == pytest.approx(0.05 * flops)
    assert step_seconds(by_size["lstm", 3000], known) is None


def test_memory_by_stage_and_the_smallest_that_fits(tmp_path: Path):
    config = with_settings(
        configured(tmp_path), {"ladder.n_params": [10_000_000], "train.batch_tokens": 2048, "cluster.n_workers": 8}
    )
    line = plan(config).lines[-1]
    assert list(line.memory_bytes) == sorted(line.memory_bytes, reverse=True)
    tight = with_settings(config, {"plan.worker_memory_bytes": (line.memory_bytes[2] + line.memory_bytes[1]) / 2})
    assert plan(tight).lines[-1].smallest_stage == 2
    assert plan(with_settings(config, {"plan.worker_memory_bytes": 1000.0})).lines[-1].smallest_stage is None


@pytest.mark.parametrize("job", sorted(JOBS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_job_is_loaded_and_planned(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [str(job), f"storage={tmp_path}", "--json"]
    assert main(["plan", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    for cell in found["cells"]:
        assert cell["smallest_stage"] is not None
        assert cell["smallest_stage"] <= cell["zero_stage"]


def test_planning_six_orders_of_magnitude_is_quick(tmp_path: Path):
    began = time.monotonic()
    command = [sys.executable, "-m", "lmu_dist.cli", "plan", str(JOBS / "orders6.yaml"), f"storage={tmp_path}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert time.monotonic() - began < 15  # 3.7 s on an idle machine
    assert "112 cells" in said
    assert "token-efficiency factor, assumed 10" in said
