"""Storage at a URI does what a folder does: on an S3 server on loopback, without Ray (with it: tests/launch/test_s3.py)."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from lmu_dist import storage
from lmu_dist.config import ConfigError, DataConfig, Folder, TokenizerConfig, load, open_folder
from lmu_dist.data.prepare import prepare
from lmu_dist.tracking.spool import Spool
from lmu_dist.train import checkpoint
from lmu_dist.train.checkpoint import Meta, folder_name, newest_intact, prune, seal

# aiohttp leaves a connection to the end of the process.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def remote(bucket: str, tmp_path: Path, machine) -> Folder:
    return open_folder(f"{bucket}/{tmp_path.name}")


def test_a_corpus_at_a_uri_is_that_of_a_folder(corpus_glob: str, remote: Folder, tmp_path: Path, machine):
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


def test_what_is_half_done_goes_on_at_a_uri(corpus_glob: str, remote: Folder, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=TokenizerConfig(vocab_tokens=400))

    def break_down(path: Folder, content: bytes) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        write(path, content)

    write = storage.write_whole
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_whole", break_down)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, remote)
    made = []
    corpus = prepare(data, remote, lambda what, *_: made.append(what))
    assert "tokenizing" not in made
    assert corpus.manifest.splits["train"]["tokens"] > 1000


@pytest.mark.parametrize("where", ["folder", "uri"])
def test_checkpoints_are_found_fetched_and_pruned(where: str, remote: Folder, tmp_path: Path):
    run = remote / "run" if where == "uri" else tmp_path / "run"
    for step in (10, 20, 100):
        folder, local = run / folder_name(step, 1, "a1"), tmp_path / f"made-{step}"
        (local / "zero").mkdir(parents=True)
        (local / "zero" / "shard.pt").write_bytes(b"shard" * step)
        seal(local, Meta(step, "key", 1, 1, "data", "tokenizer", "code", {}, {}), 0, {})
        for path in (p for p in local.rglob("*") if p.is_file()):
            (folder / path.relative_to(local).parent).mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(local)).write_bytes(path.read_bytes())
    found, meta, passed_over = newest_intact(run)
    assert found is not None
    assert (meta and meta.step, passed_over) == (100, [])
    (found / "zero" / "shard.pt").write_bytes(b"SHARD" * 100)
    found, meta, [reason] = newest_intact(run)
    assert found is not None
    assert (meta and meta.step, "shard.pt is damaged" in reason) == (20, True)
    if where == "uri":
        storage.fetch_folder(found, tmp_path / "fetched")
        assert (tmp_path / "fetched" / "zero" / "shard.pt").read_bytes() == b"shard" * 20
        assert checkpoint.verify(tmp_path / "fetched") == meta
    prune(run, 1)
    assert sorted(p.name[5:13] for p in run.iterdir()) == ["00000100"]


def entries(spool: Spool) -> list[dict]:
    return [entry for _, entry in spool.pending()]


def test_a_spool_goes_on_on_another_machine(remote: Folder, machine):
    spool = Spool(remote / "run", "r1")
    spool.params({"a": 1})
    spool.metrics(0, {"loss": 3.0})
    spool.copy()
    [(first, _), (second, _)] = spool.pending()
    spool.delivered(first)
    spool.metrics(1, {"loss": 2.0})
    spool.copy()
    spool.metrics(2, {"loss": 1.0})  # heard by MLflow, and lost with the machine
    assert Spool.exists(remote / "run")

    machine("second")
    assert not Spool.exists(remote / "run")
    again = Spool(remote / "run", "r1", {"loss": 2})
    assert [e["step"] for e in entries(again) if e["kind"] == "metrics"] == [0, 1]
    for step in (1, 2, 3):
        again.metrics(step, {"loss": 0.5})
    assert [e["step"] for e in entries(again) if e["kind"] == "metrics"] == [0, 1, 3]
    again.copy()

    machine("first")  # back where it began, which does not know the latest
    assert not Spool.exists(remote / "run")
    assert [e["step"] for e in entries(Spool(remote / "run", "r1")) if e["kind"] == "metrics"] == [0, 1, 3]
    assert second > first


def test_what_is_being_written_appears_whole_or_not_at_all(remote: Folder, tmp_path: Path):
    for path in (remote / "f", tmp_path / "f"):
        with suppress(KeyboardInterrupt), storage.writing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
        assert not path.exists()
        storage.write_whole(path, b"whole")
        assert path.read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://key:secret@studies/x", "credentials; give them in the environment"),
        ("what://studies/x", "Unsupported filesystem|Protocol not known"),
        ("s3://no-such-bucket-here/x", "cannot write to s3://no-such-bucket-here/x: .*AWS_ENDPOINT_URL"),
    ],
)
def test_a_storage_that_cannot_be_is_one_line(uri: str, reason: str, bucket: str, tmp_path: Path):
    (tmp_path / "job.yaml").write_text(json.dumps({"storage": uri}))
    with pytest.raises(ConfigError, match=reason) as e:
        storage.check_writable(load(tmp_path / "job.yaml").storage_folder)
    assert "\n" not in str(e.value)
    assert "secret" not in str(e.value)


def test_a_storage_that_does_not_answer_is_one_line(tmp_path: Path):
    away = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    (tmp_path / "job.yaml").write_text(json.dumps({"storage": "s3://away/x"}))
    # In a process of its own, since clients remember where they have been.
    command = [sys.executable, "-m", "lmu_dist.cli", "plan", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, env=os.environ | away | {"AWS_MAX_ATTEMPTS": "1"}, capture_output=True, text=True)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith("lmu-dist: storage: cannot reach s3://away/x: Could not connect")
