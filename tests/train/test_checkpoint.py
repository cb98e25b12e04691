"""Tests of checkpoints: damage is detected and named, and the newest intact checkpoint is used."""

from pathlib import Path

import pytest
import torch

from lmu_dist.train.checkpoint import (
    WEIGHTS,
    CheckpointError,
    Meta,
    folder_name,
    newest_branch_point,
    newest_intact,
    read_weights,
    verify,
    write_manifest,
)


def write_checkpoint(run: Path, step: int, world_size: int = 2) -> Path:
    """Writes a checkpoint as Ray merges it: the files of all ranks in one folder."""
    folder = run / folder_name(step, world_size, "a1")
    meta = Meta(step, "key", world_size, 1, "data", "tokenizer", "code", {}, {})
    for rank in range(world_size):
        rank_folder = run.parent / f"rank-{rank}-{step}"
        (rank_folder / "zero").mkdir(parents=True)
        (rank_folder / "zero" / f"shard-{rank}.pt").write_bytes(bytes([rank]) * 1000)
        write_manifest(rank_folder, meta, rank, {"w": torch.full((3,), float(step))} if rank == 0 else {})
        for path in rank_folder.rglob("*"):
            if path.is_file():
                target = folder / path.relative_to(rank_folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
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
    _, meta, [reason] = newest_intact(run)
    assert meta is not None
    assert meta.step == 20
    assert Path(name).name in reason
    assert str(newest) in reason


def test_all_checkpoints_damaged_is_an_error_and_nothing_is_deleted(run: Path):
    for folder in run.iterdir():
        flip_bit(folder / "meta.json")
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged, and no older checkpoint .* delete .*run"):
        newest_intact(run)
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
