"""`lmu-dist train` on Ray: two workers, ZeRO 1, MLflow; also with a killed worker and an interrupted driver.

Each run takes 20 to 40 seconds; other tests cover what needs no Ray.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lmu_dist import records
from lmu_dist.cli import main
from lmu_dist.config import Config, ConfigError, load
from lmu_dist.launch.record import FinishedRun
from lmu_dist.launch.trainer import train
from lmu_dist.tracking.runs import records_of, runs_of
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.train.checkpoint import newest_intact

STEPS = 400
# Ray and DeepSpeed raise warnings, and keep sockets open until the process ends.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def job(corpus_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of a small LMU; each test sets its own storage."""
    path = tmp_path_factory.mktemp("job") / "job.yaml"
    tree = {
        "experiment": "tests",
        "data": {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}},
        "model": {"n_params": 3000},
        "train": {
            "tokens": STEPS * 256,
            "batch_tokens": 256,
            "sequence_tokens": 32,
            "warmup_tokens": 2560,
            "eval_every_tokens": 25_600,
            "eval_tokens": 512,
        },
        "cluster": {"n_workers": 2, "checkpoint_every_steps": 100},
    }
    path.write_text(json.dumps(tree))
    return path


def configured(job: Path, storage: Path, *overrides: str) -> Config:
    return load(job, [f"storage={storage}", *overrides])


def losses(finished: FinishedRun) -> dict[int, float]:
    """The training loss by step, after a check that no step is logged twice."""
    points = Store(finished.tracking_uri).client.get_metric_history(finished.run_id, records.TRAIN_LOSS)
    assert len({p.step for p in points}) == len(points)
    return {p.step: p.value for p in points}


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(configured(job, folder), default_uri(folder))


@pytest.mark.timeout(300)
def test_run_is_trained_and_recorded(undisturbed: FinishedRun):
    record = undisturbed.record
    assert (record.status, record.phase, record.steps, record.tokens) == ("complete", "decayed", STEPS, STEPS * 256)
    assert record.unique_tokens == 32 * len(undisturbed.cell.corpus.rows("train", 32)) > 0
    history = losses(undisturbed)
    assert sorted(history) == list(range(STEPS))
    assert record.train_loss_nats == history[STEPS - 1] < history[0] - 1
    assert 0 < record.val_loss_standard_error_nats < 0.5
    assert record.val_loss_nats == pytest.approx(history[STEPS - 1], abs=0.5)
    store = Store(undisturbed.tracking_uri)
    assert records_of(store, "tests") == {undisturbed.run_id: record}
    run = store.client.get_run(undisturbed.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["lmu.attempt"] == "1"
    assert run.data.tags["lmu.n_workers"] == "2"
    assert run.data.tags["lmu.worker_group"].startswith("train-")
    assert run.data.tags["lmu.operator"] == "fused: transforms, c++"
    assert run.data.params["train.learning_rate"] == "0.01"
    assert "None" not in {value for key, value in run.data.params.items() if not key.startswith("model.")}
    assert run.inputs.dataset_inputs[0].dataset.digest == record.data_digest[:36]
    parent = store.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert (parent.data.tags["lmu.study"], parent.info.status) == ("train", "FINISHED")
    assert parent.data.metrics["study/best_val_loss_nats/lmu"] == record.val_loss_nats
    curve = store.client.get_metric_history(undisturbed.run_id, records.POSITION_LOSS)
    assert [p.step for p in sorted(curve, key=lambda p: p.step)] == list(range(1, 33))
    assert sum(p.value for p in curve) / 32 == pytest.approx(record.val_loss_nats)
    assert {a.path for a in store.client.list_artifacts(undisturbed.run_id)} == {"position_loss.csv", "position_loss.json"}
    assert len(list(undisturbed.cell.folder.glob("step-*"))) == 2


def test_finished_run_is_not_trained_again(undisturbed: FinishedRun):
    began = time.monotonic()
    again = train(undisturbed.cell.config, undisturbed.tracking_uri)
    assert time.monotonic() - began < 20
    assert again.already_done
    assert (again.record, again.run_id) == (undisturbed.record, undisturbed.run_id)
    # nor if only MLflow has its record
    record = undisturbed.cell.folder / "record.json"
    record.rename(record.with_suffix(".moved"))
    elsewhere = train(undisturbed.cell.config, undisturbed.tracking_uri)
    record.with_suffix(".moved").rename(record)
    assert elsewhere.already_done
    assert elsewhere.record == undisturbed.record


def test_finished_run_is_uploaded_to_a_new_store(undisturbed: FinishedRun, tmp_path: Path):
    moved = train(undisturbed.cell.config, default_uri(tmp_path))
    assert moved.already_done
    assert moved.run_id != undisturbed.run_id
    assert losses(moved) == losses(undisturbed)
    assert records_of(Store(moved.tracking_uri), "tests") == {moved.run_id: undisturbed.record}


def test_generate_and_export(undisturbed: FinishedRun, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", undisturbed.tracking_uri)
    run, out = str(undisturbed.cell.folder), str(tmp_path / "export")
    assert main(["export", run, out]) == 0
    texts = []
    for source in (run, undisturbed.run_id, out):
        capfd.readouterr()
        assert main(["generate", source, "--prompt", "ab cd", "--tokens", "30"]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert main(["train", undisturbed.cell.name, "--json"]) == 0  # as its table prints it, without the YAML file
    assert json.loads(capfd.readouterr().out)["run_id"] == undisturbed.run_id
    assert len(texts[0]) > 20
    assert main(["export", run, out]) == 2
    assert "is not an empty folder" in capfd.readouterr().err


def test_damaged_checkpoints_and_a_wrong_tokenizer_are_reported(undisturbed: FinishedRun, tmp_path: Path, capfd):
    run = tmp_path / "run"
    shutil.copytree(undisturbed.cell.folder, run)
    [older, newest] = sorted(run.glob("step-*"))
    weights = newest / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    capfd.readouterr()
    assert main(["generate", str(run), "--tokens", "3"]) == 0  # from the older checkpoint
    assert "model.safetensors is damaged" in capfd.readouterr().err
    (older / "meta.json").unlink()
    assert main(["generate", str(run), "--tokens", "3"]) == 2
    assert "model.safetensors is damaged, and no older checkpoint" in capfd.readouterr().err
    shutil.copytree(undisturbed.cell.folder, run, dirs_exist_ok=True)
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["generate", str(run), "--tokens", "3"]) == 2
    assert "is not the tokenizer this model was trained with" in capfd.readouterr().err


def test_too_many_workers_are_refused_before_anything_starts(undisturbed: FinishedRun, tmp_path: Path, capfd, monkeypatch):
    monkeypatch.setattr("lmu_dist.launch.cluster.ray.is_initialized", lambda: False)  # as a command finds it
    config = undisturbed.cell.config
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps({"storage": config.storage, "data": {"source": "files", "files": list(config.data.files)}}))
    settings = ["data.tokenizer.vocab_tokens=400", "train.sequence_tokens=32", "train.batch_tokens=131072"]
    settings += ["train.warmup_tokens=0", "cluster.n_workers=4096"]
    before = sorted(Path(config.storage).iterdir())
    assert main(["train", str(job), *settings]) == 2
    assert "cluster.n_workers=4096 with 1 CPU each does not fit on the cluster" in capfd.readouterr().err
    assert sorted(Path(config.storage).iterdir()) == before


def test_damaged_export_is_reported(undisturbed: FinishedRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = tmp_path / "export"
    assert main(["export", str(undisturbed.cell.folder), str(out)]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:100])
        capfd.readouterr()
        assert main(["generate", str(out), "--tokens", "2"]) == 2
        assert "Traceback" not in capfd.readouterr().err
        (out / name).write_bytes(content)
    (tmp_path / "file").touch()
    assert main(["export", str(undisturbed.cell.folder), str(tmp_path / "file")]) == 2


def test_finished_run_does_not_need_mlflow(undisturbed: FinishedRun, tmp_path: Path):
    cell, unreachable = undisturbed.cell, "http://127.0.0.1:9"
    folder = tmp_path / cell.folder.relative_to(cell.config.storage)
    shutil.copytree(cell.folder, folder)
    shutil.copytree(cell.corpus.folder, tmp_path / "data" / cell.corpus.folder.name)
    config = replace(cell.config, storage=str(tmp_path))
    for run_id in ("", "r"):
        if run_id:
            (folder / "run.json").write_text(json.dumps({"tracking_uri": unreachable, "run_id": run_id}))
        again = train(config, unreachable)
        assert again.already_done
        assert (again.record, again.run_id) == (undisturbed.record, run_id)
        assert "MLflow does not have all metrics of this run yet ([Errno 111] Connection refused)" in again.notes[0]


def test_inconvertible_zero_stage_is_refused_on_resume(undisturbed: FinishedRun, tmp_path: Path):
    cell = undisturbed.cell
    folder = tmp_path / cell.folder.relative_to(cell.config.storage)
    shutil.copytree(cell.folder, folder, ignore=shutil.ignore_patterns("record.json", "metrics_log*"))
    shutil.copytree(cell.corpus.folder, tmp_path / "data" / cell.corpus.folder.name)
    for stage in (0, 3):
        other = replace(cell.config, storage=str(tmp_path), cluster=replace(cell.config.cluster, zero_stage=stage))
        with pytest.raises(ConfigError, match=r"written at ZeRO stage 1, .*; go on with cluster\.zero_stage=1"):
            train(other, default_uri(tmp_path))


def _workers_of(driver: int) -> list[psutil.Process]:
    """The Ray Train workers of a local Ray that have started to train."""
    found = list[psutil.Process]()
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


# A family in a user's file runs in the workers; this one makes one of their uploads slow, so that a test can kill one in it.
SLOW_UPLOAD = """
import os
import time

from lmu_dist import storage
from lmu_dist.models.families.lmu import LMU


def slow_upload(local, to, upload=storage.upload_file):
    if "step-00000200" in str(to) and to.name.startswith("manifest"):
        time.sleep(4)
    upload(local, to)


if "WORLD_SIZE" in os.environ:
    storage.upload_file = slow_upload


class SlowUpload(LMU):
    pass
"""


@pytest.mark.timeout(600)
def test_killed_worker_and_interrupted_driver_do_not_change_the_losses(job: Path, undisturbed: FinishedRun, tmp_path: Path):
    """A worker is killed during an upload, later the driver is interrupted, which has started a local Ray; another one goes on.

    Killed drivers are test_ladder's.
    """
    (tmp_path / "slow.py").write_text(SLOW_UPLOAD)
    family = f"model.family={tmp_path / 'slow.py'}:SlowUpload"
    driver = subprocess.Popen(
        [sys.executable, "-m", "lmu_dist.cli", "train", str(job), f"storage={tmp_path}", family],
        env=os.environ | {"MLFLOW_TRACKING_URI": default_uri(tmp_path)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )

    def wait_for(reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + 300
        while not reached():
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def files(name: str) -> list[Path]:
        return list(tmp_path.glob(f"*/*/{name}"))

    wait_for(lambda: files("step-00000200-*/meta.json"))
    wait_for(lambda: any(log.read_bytes().count(b'"train/loss_nats"') > 210 for log in files("metrics_log.jsonl")))
    [state] = [newest_intact(meta.parents[1])[1] for meta in files("step-00000200-*/meta.json")]
    assert (state and state.step) == 100  # training went on during the upload
    _workers_of(driver.pid)[-1].send_signal(signal.SIGKILL)
    wait_for(lambda: files("step-00000300-*/meta.json"))
    driver.send_signal(signal.SIGINT)
    _, error = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert "interrupted; run the same command again" in error
    store = Store(default_uri(tmp_path))
    [run] = runs_of(store, "tests")
    assert (run.info.status, run.data.tags["lmu.status"], run.data.tags["lmu.attempt"]) == ("KILLED", "interrupted", "2")
    finished = train(configured(job, tmp_path, family), default_uri(tmp_path))
    assert not finished.already_done
    assert losses(finished) == losses(undisturbed)
    assert finished.record.val_loss_nats == undisturbed.record.val_loss_nats
    assert list(records_of(store, "tests")) == [finished.run_id] == [run.info.run_id]
    run = store.client.get_run(finished.run_id)
    assert (run.info.status, run.data.tags["lmu.attempt"]) == ("FINISHED", "3")
