"""Tests of checkpoints: damage is detected and named, and the newest intact checkpoint is used."""

import json
import threading
from pathlib import Path

import pytest
import torch
from virtual_ranks import on_ranks

from lmu_dist import storage
from lmu_dist.train import checkpoint
from lmu_dist.train.checkpoint import (
    CheckpointError,
    Meta,
    Uploader,
    folder_name,
    newest_branch_point,
    newest_intact,
    prune,
    upload,
    verify,
    write_manifest,
)
from lmu_dist.train.weights import WEIGHTS, read_weights, write_weights


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks per file, as large checkpoints have."""
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 256)


def write_rank(folder: Path, step: int, rank: int) -> Path:
    """Writes a rank's part of a checkpoint, without its manifest."""
    (folder / "zero").mkdir(parents=True)
    (folder / "zero" / f"shard-{rank}.pt").write_bytes(bytes([rank]) * 1000)
    if rank == 0:
        meta = Meta(step, "key", 2, 1, "data", "tokenizer", "code", {}, {})
        write_weights(folder, meta, {"w": torch.full((3,), float(step))})
    return folder


def write_checkpoint(run: Path, step: int, world_size: int = 2) -> Path:
    folder = run / folder_name(step, world_size, "a1")
    for rank in range(world_size):
        local = write_rank(run.parent / f"rank-{rank}-{step}", step, rank)
        write_manifest(local, rank, world_size)
        upload(local, folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 100):
        write_checkpoint(tmp_path / "run", step)
    return tmp_path / "run"


def test_newest_checkpoint_is_used(run: Path):
    folder, meta, skipped = newest_intact(run)
    assert folder is not None
    assert meta is not None
    assert (meta.step, skipped) == (100, [])
    assert read_weights(folder)["w"].tolist() == [100.0] * 3


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ("zero/shard-1.pt", WEIGHTS, "meta.json", "manifest-00000.json", "manifest-00001.json")
DAMAGES = {"missing": Path.unlink, "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]), "bit flip": flip_bit}


# A manifest has no digest of its own: a bit flip in it changes the digest, or the name, of a file that it lists.
@pytest.mark.parametrize(
    ("name", "damage"), [(n, d) for n in FILES for d in DAMAGES if not (n.startswith("manifest") and d == "bit flip")]
)
def test_damaged_checkpoint_is_named_and_the_previous_one_used(run: Path, name: str, damage: str):
    newest = run / folder_name(100, 2, "a1")
    DAMAGES[damage](newest / name)
    found, meta, [reason] = newest_intact(run)
    assert meta is not None
    assert meta.step == 20
    assert Path(name).name in reason
    assert str(newest) in reason
    assert on_ranks(3, lambda ranks: newest_intact(run, ranks)) == [(found, meta, [reason])] * 3


def test_all_checkpoints_damaged_is_an_error_and_nothing_is_deleted(run: Path):
    for folder in run.iterdir():
        flip_bit(folder / "meta.json")
    for find in (newest_intact, lambda run: on_ranks(3, lambda ranks: newest_intact(run, ranks))):
        with pytest.raises(CheckpointError, match=r"meta\.json is damaged, and no older checkpoint .* delete .*run"):
            find(run)
    assert len(list(run.iterdir())) == 3


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_run_killed_during_its_first_checkpoint_has_none(tmp_path: Path, damage: str):
    DAMAGES[damage](write_checkpoint(tmp_path / "run", 10) / WEIGHTS)
    folder, meta, [reason] = newest_intact(tmp_path / "run")
    assert (folder, meta) == (None, None)
    assert WEIGHTS in reason


def test_newest_branch_point_that_is_loadable_is_used(run: Path):
    assert newest_branch_point(run, 15, 1)[1].step == 10  # pyright: ignore[reportOptionalMemberAccess]
    assert newest_branch_point(run, 100, 1)[1].step == 100  # pyright: ignore[reportOptionalMemberAccess]
    flip_bit(run / folder_name(100, 2, "a1") / WEIGHTS)
    assert newest_branch_point(run, 100, 1)[1].step == 20  # pyright: ignore[reportOptionalMemberAccess]
    assert newest_branch_point(run, 5, 1) == (None, None)
    assert newest_branch_point(run, 100, 2)[1].step == 20  # pyright: ignore[reportOptionalMemberAccess]
    assert newest_branch_point(run, 100, 3) == newest_branch_point(run, 100, 0) == (None, None)


def test_new_run_has_no_checkpoint(tmp_path: Path):
    assert newest_intact(tmp_path / "nothing") == (None, None, [])


def test_checkpoint_without_all_manifests_is_incomplete(run: Path):
    folder = write_checkpoint(run, 200)
    (folder / "manifest-00001.json").unlink()
    with pytest.raises(CheckpointError, match="manifest-00001"):
        verify(folder)


def test_checkpoint_with_one_digest_per_file_is_intact(run: Path):
    """As earlier versions wrote them."""
    newest = run / folder_name(100, 2, "a1")
    for path in newest.glob("manifest-*"):
        manifest = json.loads(path.read_text())
        files = {name: [size, storage.digest(newest / name)] for name, (size, _) in manifest["files"].items()}
        path.write_text(json.dumps({"world_size": 2, "files": files}))
    assert [m and m.step for _, m, _ in on_ranks(3, lambda ranks: newest_intact(run, ranks))] == [100] * 3
    flip_bit(newest / "zero" / "shard-1.pt")
    with pytest.raises(CheckpointError, match=r"shard-1\.pt is damaged"):
        verify(newest)


def test_unfinished_upload_is_not_the_newest_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever has been uploaded when the ranks are killed, the checkpoint before is used, until all have uploaded all."""
    copy, to = storage.upload_file, run / folder_name(200, 2, "a1")
    held, going = threading.Semaphore(0), threading.Semaphore(0)

    def held_upload(local: Path, target: Path) -> None:
        held.acquire()
        copy(local, target)
        going.release()

    monkeypatch.setattr(storage, "upload_file", held_upload)
    uploaders = [Uploader(), Uploader()]
    for rank, uploader in enumerate(uploaders):
        uploader.start(write_rank(tmp_path / f"local-{rank}", 200, rank), to, rank, 2)
    n_files = 4 + 2
    for _ in range(n_files):
        assert newest_intact(run)[1].step == 100  # pyright: ignore[reportOptionalMemberAccess]
        prune(run, 3)  # keeps the three that are intact
        held.release()
        going.acquire()
    for uploader in uploaders:
        uploader.wait()
    assert newest_intact(run)[1].step == 200  # pyright: ignore[reportOptionalMemberAccess]
    assert len(list(run.iterdir())) == 4
    assert list(tmp_path.glob("local-*")) == []


def test_failed_upload_is_an_error_and_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(local: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "upload_file", full)
    for end in (Uploader.wait, poll):
        uploader, local = Uploader(), write_rank(tmp_path / "local", 200, 0)
        uploader.start(local, run / folder_name(200, 1, "a1"), 0, 1)
        with pytest.raises(OSError, match="No space left"):
            end(uploader)
        assert not local.exists()


def poll(uploader: Uploader) -> None:
    while True:
        uploader.raise_error()
