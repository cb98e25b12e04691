"""Tests of storage at a URI, on an emulated S3 server on loopback, without Ray (with Ray: tests/launch/test_s3.py)."""

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmu_dist import storage
from lmu_dist.config import ConfigError, DataConfig, Folder, TokenizerConfig, load, open_folder
from lmu_dist.data.prepare import prepare
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.train import checkpoint, reshard
from lmu_dist.train.checkpoint import Meta, folder_name, newest_intact, prune, upload, write_manifest
from lmu_dist.train.weights import write_weights

# aiohttp keeps a connection open until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def remote(bucket: str, tmp_path: Path, machine) -> Folder:
    return open_folder(f"{bucket}/{tmp_path.name}")


def test_corpus_at_a_uri_equals_one_in_a_folder(corpus_glob: str, remote: Folder, tmp_path: Path, machine):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=TokenizerConfig(vocab_tokens=400))
    here, there = prepare(data, tmp_path / "runs"), prepare(data, remote)
    assert there.manifest == here.manifest
    assert sorted(p.name for p in there.folder.iterdir()) == sorted(p.name for p in here.folder.iterdir() if p.name != "lock")
    machine("second")
    first = np.arange(3)
    assert there.rows("train", 32).batch(first).inputs.equal(here.rows("train", 32).batch(first).inputs)
    (there.folder / "validation.bin").write_bytes(b"x" * (there.folder / "validation.bin").stat().st_size)
    with pytest.raises(ConfigError, match=r"validation\.bin is damaged.*prepare again"):
        there.rows("validation", 32)


def test_interrupted_preparation_resumes_at_a_uri(corpus_glob: str, remote: Folder, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=TokenizerConfig(vocab_tokens=400))

    def interrupted_write(path: Folder, content: bytes) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        write(path, content)

    write = storage.write_atomic
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", interrupted_write)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, remote)
    activities = []
    corpus = prepare(data, remote, lambda activity, *_: activities.append(activity))
    assert "tokenizing" not in activities
    assert corpus.manifest.splits["train"]["tokens"] > 1000


@pytest.mark.parametrize("where", ["folder", "uri"])
def test_checkpoints_are_found_downloaded_and_pruned(where: str, remote: Folder, tmp_path: Path):
    run = remote / "run" if where == "uri" else tmp_path / "run"
    for step in (10, 20, 100):
        folder, local = run / folder_name(step, 1, "a1"), tmp_path / f"made-{step}"
        (local / "zero").mkdir(parents=True)
        (local / "zero" / "shard.pt").write_bytes(b"shard" * step)
        write_weights(local, Meta(step, "key", 1, 1, "data", "tokenizer", "code", {}, {}), {})
        write_manifest(local, 0, 1)
        upload(local, folder)
    found, meta, skipped = newest_intact(run)
    assert found is not None
    assert (meta and meta.step, skipped) == (100, [])
    (found / "zero" / "shard.pt").write_bytes(b"SHARD" * 100)
    found, meta, [reason] = newest_intact(run)
    assert found is not None
    assert (meta and meta.step, "shard.pt is damaged" in reason) == (20, True)
    if where == "uri":
        checkpoint.download_shared_shards(found, tmp_path / "downloaded")
        assert [p.relative_to(tmp_path / "downloaded") for p in (tmp_path / "downloaded").rglob("*.pt")] == [
            Path("zero/shard.pt")
        ]
        assert (tmp_path / "downloaded" / "zero" / "shard.pt").read_bytes() == b"shard" * 20
    prune(run, 1)
    assert sorted(p.name[5:13] for p in run.iterdir()) == ["00000100"]


@pytest.mark.parametrize("where", ["folder", "uri"])
def test_parts_of_a_tensor_are_read(where: str, remote: Folder, tmp_path: Path):
    """Rank 1 of 2 reads the second half of what one rank saved at stage 3."""
    weights, moments = torch.arange(3000.0), torch.arange(3000.0) / 7
    shapes = [{"w": torch.Size((30, 100))}]
    model = {
        "param_shapes": shapes,
        "dp_world_size": 1,
        "ds_version": "0.19.8",
        "buffer_names": ["b"],
        "module": {"b": weights[5:9]},
    }
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": moments}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"optimizer_state_dict": {"optimizer_state_dict": optimizer, "fp32_flat_groups": [weights]}}
    torch.save(model | dict.fromkeys(reshard.COUNTERS, 3), tmp_path / "model")
    torch.save(content, tmp_path / "optimizer")
    folder = remote / "zero" if where == "uri" else tmp_path / "zero"
    storage.upload_file(tmp_path / "model", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    storage.upload_file(tmp_path / "optimizer", folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    state = reshard.read(folder, shapes, 1, 2)
    assert state.optimizer["fp32_flat_groups"][0].equal(weights[1500:])
    assert state.optimizer["optimizer_state_dict"]["state"][0]["exp_avg"].equal(moments[1500:])
    assert state.optimizer["optimizer_state_dict"]["state"][0]["step"] == 3
    assert state.buffers["b"].equal(weights[5:9])


def entries(log: MetricsLog) -> list[dict]:
    return [entry for _, entry in log.pending()]


def test_metrics_log_continues_on_another_machine(remote: Folder, machine):
    log = MetricsLog(remote / "run", "r1")
    log.log_params({"a": 1})
    log.log_metrics(0, {"loss": 3.0})
    log.copy_to_storage()
    [(first, _), (second, _)] = log.pending()
    log.mark_uploaded(first)
    log.log_metrics(1, {"loss": 2.0})
    log.copy_to_storage()
    log.log_metrics(2, {"loss": 1.0})  # in MLflow, but lost with the machine
    assert MetricsLog.is_complete(remote / "run")

    machine("second")
    assert not MetricsLog.is_complete(remote / "run")
    again = MetricsLog(remote / "run", "r1", {"loss": 2})
    assert [e["step"] for e in entries(again) if e["kind"] == "metrics"] == [0, 1]
    for step in (1, 2, 3):
        again.log_metrics(step, {"loss": 0.5})
    assert [e["step"] for e in entries(again) if e["kind"] == "metrics"] == [0, 1, 3]
    again.copy_to_storage()

    machine("first")  # the first machine again, which lacks the newest entries
    assert not MetricsLog.is_complete(remote / "run")
    assert [e["step"] for e in entries(MetricsLog(remote / "run", "r1")) if e["kind"] == "metrics"] == [0, 1, 3]
    assert second > first


def test_interrupted_write_leaves_no_file(remote: Folder, tmp_path: Path):
    for path in (remote / "f", tmp_path / "f"):
        with suppress(KeyboardInterrupt), storage.open_atomic(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
        assert not path.exists()
        storage.write_atomic(path, b"whole")
        assert path.read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://key:secret@studies/x", "credentials; give them in the environment"),
        ("what://studies/x", "Unsupported filesystem|Protocol not known"),
        ("s3://no-such-bucket-here/x", "cannot write to s3://no-such-bucket-here/x: .*AWS_ENDPOINT_URL"),
    ],
)
def test_unusable_storage_is_a_one_line_error(uri: str, message: str, bucket: str, tmp_path: Path):
    (tmp_path / "job.yaml").write_text(json.dumps({"storage": uri}))
    with pytest.raises(ConfigError, match=message) as e:
        storage.check_writable(load(tmp_path / "job.yaml").storage_folder)
    assert "\n" not in str(e.value)
    assert "secret" not in str(e.value)


def test_unreachable_storage_is_a_one_line_error(tmp_path: Path):
    unreachable = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    (tmp_path / "job.yaml").write_text(json.dumps({"storage": "s3://away/x"}))
    # In a process of its own, because S3 clients are cached in the process.
    command = [sys.executable, "-m", "lmu_dist.cli", "plan", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, env=os.environ | unreachable | {"AWS_MAX_ATTEMPTS": "1"}, capture_output=True, text=True)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("lmu-dist: storage: cannot reach s3://away/x: Could not connect")


def test_failed_write_leaves_no_part_behind(tmp_path: Path):
    """On a full disk a part would take the space that the next attempt needs."""

    def write_half() -> None:
        with storage.open_atomic(tmp_path / "record.json") as file:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    storage.write_atomic(tmp_path / "record.json", b"before")
    with pytest.raises(OSError, match="No space left"):
        write_half()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("record.json", b"before")]


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a writer hides it, as torch.save does."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/runs/x.bin")
    assert storage.error_text(full) == "the disk is full: '/data/runs/x.bin'; free some space"
    assert storage.error_text(f"OSError: {full}") == "the disk is full: '/data/runs/x.bin'; free some space"
    copied = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x.bin", None, "/data/runs/x.bin")
    assert storage.error_text(copied) == "the disk is full: '/data/runs/x.bin'; free some space"
    assert storage.error_text(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))) == "the disk is full; free some space"
    assert storage.error_text("(sqlite3.OperationalError) database or disk is full") == "the disk is full; free some space"
    assert storage.error_text(ValueError("two\n lines")) == "two lines"
    with pytest.raises(RuntimeError, match="file write failed"), storage.full_disk_errors(tmp_path):
        raise RuntimeError("PytorchStreamWriter: file write failed")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match="No space left"), storage.full_disk_errors(tmp_path):
        raise RuntimeError("PytorchStreamWriter: file write failed")
