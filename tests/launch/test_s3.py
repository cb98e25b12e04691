"""All commands with storage at s3://: prepare, train, kill, resume on another machine, export, generate, report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmu_dist import records
from lmu_dist.cli import main
from lmu_dist.config import load, open_folder
from lmu_dist.launch.trainer import train
from lmu_dist.tracking.runs import runs_of
from lmu_dist.tracking.store import Store, default_uri

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
STEPS = 2000


@pytest.mark.timeout(600)
def test_all_commands_with_storage_on_s3(corpus_glob: str, bucket: str, tmp_path: Path, machine, capfd, monkeypatch):
    job, storage = tmp_path / "job.yaml", f"{bucket}/{tmp_path.name}"
    tree = {
        "experiment": "on-s3",
        "storage": storage,
        "data": {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}},
        "model": {"n_params": 3000},
        "train": {"tokens": STEPS * 256, "batch_tokens": 256, "sequence_tokens": 32, "warmup_tokens": 2560},
        "cluster": {"n_workers": 2, "checkpoint_every_steps": 100},
    }
    tree["train"] |= {"eval_every_tokens": 25_600, "eval_tokens": 512}
    job.write_text(json.dumps(tree))
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_uri(tmp_path))
    undisturbed = train(load(job, [f"storage={tmp_path / 'runs'}"]), default_uri(tmp_path / "runs"))

    assert main(["prepare", str(job)]) == 0
    assert f"folder      {storage}/data/" in capfd.readouterr().out
    command = [sys.executable, "-m", "lmu_dist.cli", "train", str(job), "--json"]
    first = subprocess.Popen(command, env=os.environ.copy(), stdout=subprocess.DEVNULL, start_new_session=True)
    folder = open_folder(storage) / undisturbed.cell.folder.relative_to(undisturbed.cell.config.storage)
    deadline = time.monotonic() + 200
    while not list(folder.glob("step-*/manifest-*.json")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)  # the driver; its local Ray cluster ends with it
    first.wait()

    store = Store(default_uri(tmp_path))
    [run] = runs_of(store, "on-s3")
    machine("second")
    second = subprocess.run(command, env=os.environ.copy(), capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    printed = json.loads(second.stdout)
    assert printed["val_loss_nats"] == undisturbed.record.val_loss_nats
    assert (printed["folder"], printed["run_id"]) == (str(folder), run.info.run_id)
    for finished_store, run_id in ((store, run.info.run_id), (Store(undisturbed.tracking_uri), undisturbed.run_id)):
        points = finished_store.client.get_metric_history(run_id, records.TRAIN_LOSS)
        assert sorted(p.step for p in points) == list(range(STEPS))
    run_id = run.info.run_id
    assert store.client.get_run(run_id).data.tags["lmu.attempt"] == "2"

    capfd.readouterr()
    out = f"{storage}/exported"
    assert main(["export", run_id, out]) == 0
    texts = []
    for source in (run_id, out, str(folder)):
        capfd.readouterr()
        assert main(["generate", source, "--prompt", "ab cd", "--tokens", "20"]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert main(["report", "on-s3", "-o", f"{storage}/report"]) == 0
    assert b"<html" in (open_folder(storage) / "report" / "report.html").read_bytes()
