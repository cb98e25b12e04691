"""The ladder on Ray: cells with 1 and 2 workers on four CPUs, a forced divergence, shared cells, killed and rival drivers.

Every start of workers takes some ten seconds; tests/planning, test_work_queue and test_dispatcher cover what needs no Ray.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.util import placement_group_table

from lmu_dist import records
from lmu_dist.cli import main
from lmu_dist.config import Config, ConfigError, load
from lmu_dist.launch.calibrate import calibrate
from lmu_dist.launch.ladder import ladder
from lmu_dist.launch.ladder_state import LadderResult
from lmu_dist.launch.new_cell import at_half_rate
from lmu_dist.launch.record import FinishedRun
from lmu_dist.planning.cost import plan
from lmu_dist.records import RunRecord
from lmu_dist.tracking.progress import rows
from lmu_dist.tracking.runs import records_of, runs_of
from lmu_dist.tracking.store import Store, default_uri

# Ray and DeepSpeed raise warnings, and keep sockets open until the process ends.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
SHORT, LONG = 12_800, 25_600


@pytest.fixture(scope="module")
def job(corpus_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.yaml"
    tree = {
        "experiment": "grid",
        "data": {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}},
        "train": {
            "batch_tokens": 256,
            "sequence_tokens": 32,
            "schedule": "wsd",
            "warmup_tokens": 2560,
            "plateau_patience": 1,
            "eval_every_tokens": 3_200,
            "eval_tokens": 512,
        },
        "ladder": {
            "families": ["lmu"],
            "n_params": [1000, 3000],
            "tokens": [SHORT, LONG],
            "workers": [{"n_params": 0, "n_workers": 1}, {"n_params": 3000, "n_workers": 2, "zero_stage": 2}],
        },
        "cluster": {"checkpoint_every_steps": 15},
    }
    path.write_text(json.dumps(tree))
    return path


def configured(job: Path, storage: Path, *overrides: str) -> Config:
    return load(job, [f"storage={storage}", *overrides])


def by_key(result: LadderResult) -> dict[str, RunRecord]:
    return {f.cell.key: f.record for f in result.finished}


DIVERGING = {"train.learning_rate": 1000, "train.clip_norm": 0}
WITH_LSTM = (
    "ladder.families=[lmu, lstm]",
    f"ladder.tuned={json.dumps([{'family': 'lstm', 'n_params': n, 'settings': DIVERGING} for n in (1000, 3000)])}",
)


@pytest.fixture(scope="module")
def undisturbed(job: Path, local_ray: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LadderResult]:
    """A ladder of LMUs, and of LSTMs that all diverge."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, ladder(configured(job, folder, *WITH_LSTM), default_uri(folder))


def of_family(result: LadderResult, family: str) -> list[FinishedRun]:
    return [f for f in result.finished if f.record.family == family]


def test_cells_of_all_sizes_complete_and_release_their_resources(undisturbed: tuple[Path, LadderResult]):
    _, result = undisturbed
    assert not result.failures
    assert not [note for note in result.notes if "Ray still holds" in note]
    finished = of_family(result, "lmu")
    assert len(finished) == 4
    assert {(f.record.status, f.record.phase) for f in finished} == {(records.COMPLETE, "decayed")}
    assert {f.cell.config.cluster.n_workers for f in finished} == {1, 2}
    assert not any(f.already_done for f in result.finished)
    groups = placement_group_table()
    assert groups
    assert {g["state"] for g in groups.values()} == {"REMOVED"}
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == 4


def test_diverged_cell_is_stopped_retried_and_recorded(job: Path, undisturbed: tuple[Path, LadderResult]):
    folder, result = undisturbed
    retries = [f.record for f in of_family(result, "lstm")]
    assert [r.status for r in retries] == [records.DIVERGED] * 4
    store = Store(default_uri(folder))
    runs = [run for run in runs_of(store, "grid") if run.data.tags["lmu.status"] == records.DIVERGED]
    assert [run.info.status for run in runs] == ["FAILED"] * 8
    first = {r.key: r for r in records_of(store, "grid").values()}
    for retry in retries:
        before = first[retry.retry_of]
        assert (before.status, before.phase) == (records.DIVERGED, "undecayed")
        assert before.stop_rule
        assert before.learning_rate == 2 * retry.learning_rate
        assert before.planned_tokens == retry.planned_tokens
    assert {row.state for row in rows(store, "grid") if row.name.startswith("lstm")} == {records.DIVERGED}
    again = ladder(configured(job, folder, *WITH_LSTM), default_uri(folder))
    assert all(f.already_done for f in again.finished)
    assert [f.record for f in again.finished] == [f.record for f in result.finished]


def losses(finished: FinishedRun) -> dict[int, float]:
    history = Store(finished.tracking_uri).client.get_metric_history(finished.run_id, records.TRAIN_LOSS)
    return {point.step: point.value for point in history}


def test_another_ladder_trains_what_is_new_and_what_is_asked_for(job: Path, undisturbed: tuple[Path, LadderResult]):
    """A cell that is asked for is trained from step 0 and equals, bit for bit, the one that began at a branch point."""
    folder, result = undisturbed
    settings = ("ladder.n_params=[1000]", f"ladder.tokens={[SHORT, LONG, 2 * LONG]}", "experiment=another")
    config, store = configured(job, folder, *settings), Store(default_uri(folder))
    with pytest.raises(ConfigError, match="--rerun ffff"):
        ladder(config, store.uri, rerun=["ffff"])
    found = {(f.cell.config.model.n_params, f.record.planned_tokens): f for f in of_family(result, "lmu")}
    branch = found[1000, LONG]
    known, rerun, new = ladder(config, store.uri, rerun=[branch.cell.key[:10]]).finished
    assert (known.already_done, rerun.already_done, new.already_done) == (True, False, False)
    assert known.record == by_key(result)[known.cell.key]
    assert (rerun.cell.key, rerun.run_id == branch.run_id) == (branch.cell.key, False)
    # a new cell starts from the latest branch point of its trunk
    steps = int(0.8 * SHORT / 256), int(0.8 * LONG / 256)
    assert (branch.record.fork_step, rerun.record.fork_step, new.record.fork_step) == (steps[0], 0, steps[1])
    assert rerun.record.val_loss_nats == branch.record.val_loss_nats
    assert sorted(losses(rerun)) == list(range(LONG // 256))
    assert losses(branch) == {step: loss for step, loss in losses(rerun).items() if step >= steps[0]}
    assert store.client.get_run(branch.run_id).data.tags["lmu.retired_key"] == branch.cell.key
    remarks = {row.key: row.remark for row in rows(store, "another")}
    assert remarks[known.cell.key] == "in another experiment"


def test_status_command_lists_all_cells(
    undisturbed: tuple[Path, LadderResult], monkeypatch, capsys: pytest.CaptureFixture[str]
):
    folder, result = undisturbed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_uri(folder))
    assert main(["status", "grid", "--json"]) == 0
    found = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    for finished in of_family(result, "lmu"):
        row = found[finished.cell.key]
        assert (row["state"], row["tokens"]) == (records.COMPLETE, row["planned_tokens"])
        assert row["loss_nats"] == finished.record.val_loss_nats
        assert (row["n_workers"], row["attempts"]) == (finished.cell.config.cluster.n_workers, 1)
    assert main(["status", "grid"]) == 0
    assert "12 of 12 cells ended" in capsys.readouterr().out  # with the first tries of those that diverged
    assert main(["status", "nothing"]) == 2
    assert "no experiment 'nothing'" in capsys.readouterr().err


def test_plan_uses_the_calibration(job: Path, undisturbed: tuple[Path, LadderResult]):
    folder, result = undisturbed
    both = json.dumps([{"n_params": 0, "n_workers": 2}])  # so that one group of workers measures both sizes
    config = configured(job, folder, f"ladder.tokens=[{LONG}]", f"ladder.workers={both}")
    assert plan(config).worker_seconds is None
    lines = list[str]()
    calibrate(config, lambda *line: lines.append(str(line)))
    found = plan(config)
    assert len(found.cells) == len(lines) - 1
    assert all(any(f"N = {line.n_params:,}: " in text for text in lines) for line in found.cells)
    assert {line.n_workers for line in found.cells} == {2}
    for line in found.cells:
        [real] = [
            f.record for f in of_family(result, "lmu") if (f.record.n_params, f.record.planned_tokens) == (line.n_params, LONG)
        ]
        assert line.step_seconds is not None
        # The cells were trained several at a time, on fewer CPUs than Ray was told.
        assert 0.02 < line.step_seconds / (real.training_seconds / real.steps) < 5


def test_unknown_baseline_is_refused_before_anything_starts(job: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^plan.baseline: unknown family 'gpt'"):
        ladder(configured(job, tmp_path, "plan.baseline=gpt"), default_uri(tmp_path))
    assert not list(tmp_path.iterdir())


def test_cell_that_cannot_fit_is_refused_before_anything_starts(job: Path, local_ray: str, tmp_path: Path):
    workers = '[{"n_params": 0, "n_workers": 1}, {"n_params": 3000, "n_workers": 8}]'
    with pytest.raises(
        ConfigError, match=r"n_workers=8 with 1 CPU each does not fit on the cluster, which can hold 4 such workers"
    ):
        ladder(configured(job, tmp_path, f"ladder.workers={workers}"), default_uri(tmp_path))
    assert not list(tmp_path.glob("lmu-*"))


def test_killed_and_rival_drivers_give_the_same_results(
    job: Path, undisturbed: tuple[Path, LadderResult], local_ray: str, tmp_path: Path
):
    """A driver of one size is killed in the middle of a run; then two at once finish the ladder, on one storage and one store.

    One of these is this process, since imports and a driver's start take as long as the training.
    """
    command = [sys.executable, "-m", "lmu_dist.cli", "ladder", str(job), f"storage={tmp_path}"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": default_uri(tmp_path), "RAY_ADDRESS": local_ray}

    def start(*overrides: str) -> subprocess.Popen[str]:
        quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, "--json", *overrides], env=environment, **quiet)  # pyright: ignore

    victim = start("ladder.n_params=[3000]")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("lmu-3k-*/*/step-*/meta.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert victim.poll() is None
    victim.kill()
    victim.communicate()
    assert len(list(tmp_path.glob("lmu-*/*/record.json"))) < 2
    rival = start()
    mine = ladder(configured(job, tmp_path), default_uri(tmp_path))
    table = json.loads(rival.communicate(timeout=300)[0])["cells"]
    assert rival.returncode == 0
    expected = {key: r.val_loss_nats for key, r in by_key(undisturbed[1]).items() if r.family == "lmu"}
    assert {key: record.val_loss_nats for key, record in by_key(mine).items()} == expected
    assert {cell["key"]: cell["val_loss_nats"] for cell in table} == expected
    assert {cell["key"]: cell["run_id"] for cell in table} == {f.cell.key: f.run_id for f in mine.finished}
    store = Store(default_uri(tmp_path))
    runs = runs_of(store, "grid")
    assert "2" in {run.data.tags["lmu.attempt"] for run in runs}  # what the killed driver had begun went on
    assert len({run.data.tags["lmu.key"] for run in runs}) == len(runs) == 4
    undisturbed_losses = {f.cell.key: losses(f) for f in of_family(undisturbed[1], "lmu")}
    for run in runs:
        points = store.client.get_metric_history(run.info.run_id, records.TRAIN_LOSS)
        assert len({p.step for p in points}) == len(points)
        assert {p.step: p.value for p in points} == undisturbed_losses[run.data.tags["lmu.key"]]
        assert run.info.status == "FINISHED"


def test_retry_has_another_key_and_the_key_of_its_cell(undisturbed: tuple[Path, LadderResult]):
    cell = of_family(undisturbed[1], "lmu")[0].cell
    halved = at_half_rate(cell)
    assert halved.retry_of == cell.key != halved.key
    assert halved.config.train.learning_rate == cell.config.train.learning_rate / 2
