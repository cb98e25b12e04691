"""Checkpoints: any damage is named, and the one before is taken."""

from pathlib import Path

import pytest
import torch

from lmu_dist.train.checkpoint import (
    WEIGHTS,
    CheckpointError,
    Meta,
    folder_name,
    newest_fork,
    newest_intact,
    read_weights,
    seal,
    verify,
)


def write(run: Path, step: int, world_size: int = 2) -> Path:
    """A checkpoint as Ray leaves it: the files of all ranks in one folder."""
    folder = run / folder_name(step, world_size, "a1")
    meta = Meta(step, "key", world_size, 1, "data", "tokenizer", "code", {}, {})
    for rank in range(world_size):
        mine = run.parent / f"rank-{rank}-{step}"
        (mine / "zero").mkdir(parents=True)
        (mine / "zero" / f"shard-{rank}.pt").write_bytes(bytes([rank]) * 1000)
        seal(mine, meta, rank, {"w": torch.full((3,), float(step))} if rank == 0 else {})
        for path in mine.rglob("*"):
            if path.is_file():
                target = folder / path.relative_to(mine)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 100):
        write(tmp_path / "run", step)
    return tmp_path / "run"


def test_the_newest_is_taken(run: Path):
    folder, meta, passed_over = newest_intact(run)
    assert folder is not None
    assert meta is not None
    assert (meta.step, passed_over) == (100, [])
    assert read_weights(folder)["w"].tolist() == [100.0] * 3


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ("zero/shard-1.pt", WEIGHTS, "meta.json", "manifest-00000.json", "manifest-00001.json")
HARMS = {"gone": Path.unlink, "short": lambda p: p.write_bytes(p.read_bytes()[:-1]), "flipped": flip}


# A manifest has no digest of its own: a flip in it breaks the digest, or the name, of a file that it lists.
@pytest.mark.parametrize(
    ("name", "harm"), [(n, h) for n in FILES for h in HARMS if not (n.startswith("manifest") and h == "flipped")]
)
def test_damage_is_named_and_the_one_before_is_taken(run: Path, name: str, harm: str):
    newest = run / folder_name(100, 2, "a1")
    HARMS[harm](newest / name)
    _, meta, [reason] = newest_intact(run)
    assert meta is not None
    assert meta.step == 20
    assert Path(name).name in reason
    assert str(newest) in reason


def test_all_damaged_is_an_error_that_throws_nothing_away(run: Path):
    for folder in run.iterdir():
        flip(folder / "meta.json")
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged, and no older checkpoint .* delete .*run"):
        newest_intact(run)
    assert len(list(run.iterdir())) == 3


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_a_run_killed_in_its_first_checkpoint_has_none(tmp_path: Path, harm: str):
    HARMS[harm](write(tmp_path / "run", 10) / WEIGHTS)
    folder, meta, [reason] = newest_intact(tmp_path / "run")
    assert (folder, meta) == (None, None)
    assert WEIGHTS in reason


def test_the_latest_fork_that_these_workers_can_load_is_taken(run: Path):
    assert newest_fork(run, 15, 1)[1].step == 10  # pyright: ignore[reportOptionalMemberAccess]
    assert newest_fork(run, 100, 1)[1].step == 100  # pyright: ignore[reportOptionalMemberAccess]
    flip(run / folder_name(100, 2, "a1") / WEIGHTS)
    assert newest_fork(run, 100, 1)[1].step == 20  # pyright: ignore[reportOptionalMemberAccess]
    assert newest_fork(run, 5, 1) == (None, None)
    assert newest_fork(run, 100, 2)[1].step == 20  # pyright: ignore[reportOptionalMemberAccess]
    assert newest_fork(run, 100, 3) == newest_fork(run, 100, 0) == (None, None)


def test_a_new_run_has_none(tmp_path: Path):
    assert newest_intact(tmp_path / "nothing") == (None, None, [])


def test_rank_files_of_a_killed_upload_are_not_a_checkpoint(run: Path):
    folder = write(run, 200)
    (folder / "manifest-00001.json").unlink()
    with pytest.raises(CheckpointError, match="manifest-00001"):
        verify(folder)
