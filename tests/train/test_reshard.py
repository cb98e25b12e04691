"""Tests of which bytes a rank hashes and reads of a large checkpoint, and of checkpoints that cannot be loaded."""

import threading
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from virtual_ranks import on_ranks

from lmu_dist import storage
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.sizing import shape_for
from lmu_dist.train import checkpoint, reshard
from lmu_dist.train.checkpoint import SHARDS, CheckpointError, Meta, folder_name
from lmu_dist.train.reshard import Layout, copies, read
from lmu_dist.train.weights import WEIGHTS, write_weights

RANKS = 64


def billion() -> list[dict[str, torch.Size]]:
    """The parameters of an LMU with N = 1e9, in the two groups of weight decay."""
    with torch.device("meta"):
        model = LanguageModel(shape_for("lmu", 10**9, vocab_tokens=50257, sequence_tokens=1024))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return [{n: s for n, s in shapes.items() if len(s) > 1}, {n: s for n, s in shapes.items() if len(s) < 2}]


def write_stage3_shards(folder: Path, layout: Layout, rank: int, version: str = "0.19.8") -> None:
    """Writes a rank's files at stage 3 as DeepSpeed does. The tensors have their sizes but no content: the files are sparse."""
    counters = dict.fromkeys(reshard.COUNTERS, 7)
    model = {"param_shapes": layout.shapes, "dp_world_size": layout.world_size, "ds_version": version, "buffer_names": []}
    folder.mkdir(parents=True)
    torch.save({**model, **counters, "module": {}}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    groups = range(len(layout.shapes))
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        flat = [[torch.empty(layout.flat_numel(group)) for group in groups] for _ in range(3)]
        state = {g: {"step": 7.0, "exp_avg": flat[0][g], "exp_avg_sq": flat[1][g]} for g in groups}
        optimizer = {"state": state, "param_groups": [{"lr": 1e-3, "params": [g]} for g in groups]}
        content = {"optimizer_state_dict": optimizer, "fp32_flat_groups": flat[2]}
        torch.save({"optimizer_state_dict": content}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Bytes that were hashed, by thread. Nothing is really hashed."""
    counted: Counter[int] = Counter()

    def digest(path: Path, begin: int, end: int) -> str:
        counted[threading.get_ident()] += end - begin
        return f"{path.name} {begin} {end}"

    monkeypatch.setattr(storage, "digest", digest)
    return counted


def test_rank_hashes_and_reads_at_most_twice_its_share_of_a_large_checkpoint(
    tmp_path: Path, hashed: Counter[int], monkeypatch: pytest.MonkeyPatch
):
    """64 ranks saved N = 1e9 at ZeRO 3; 64 or 48 resume."""
    saved = Layout(billion(), stage3=True, world_size=RANKS)
    n_parameters = sum(shape.numel() for parameters in saved.shapes for shape in parameters.values())
    assert 1e9 < n_parameters < 1.5e9
    folder = tmp_path / folder_name(100, RANKS, "a1")
    for rank in range(RANKS):
        local = tmp_path / f"rank-{rank}"
        write_stage3_shards(local / SHARDS, saved, rank)
        if rank == 0:
            write_weights(local, Meta(100, "key", RANKS, 3, "data", "tokenizer", "code", {}, {}), {})
            with open(local / WEIGHTS, "r+b") as file:
                file.truncate(4 * n_parameters)
        checkpoint.write_manifest(local, rank, RANKS)
        for path in local.rglob("*.*"):  # not `upload`, which would copy the holes of sparse files
            (folder / path.relative_to(local)).parent.mkdir(parents=True, exist_ok=True)
            path.rename(folder / path.relative_to(local))
    total = sum(path.stat().st_size for path in folder.rglob("*.*"))
    assert 16 * n_parameters < total < 16 * n_parameters * 1.001

    reads = Counter[str]()
    read_ranges = storage.read_ranges

    def counted_read(path: Path, ranges: list[tuple[int, int]]) -> list[bytearray]:
        reads[path.name] += sum(end - begin for begin, end in ranges)
        return read_ranges(path, ranges)

    monkeypatch.setattr(storage, "read_ranges", counted_read)
    for n_ranks in (64, 48):
        hashed.clear()
        reads.clear()
        found = on_ranks(n_ranks, lambda ranks: (checkpoint.newest_intact(tmp_path, ranks), hashed[threading.get_ident()]))
        assert {(path, meta.step, *skipped) for (path, meta, skipped), _ in found} == {(folder, 100)}
        n_hashed = [n_bytes for _, n_bytes in found]
        assert sum(n_hashed) == pytest.approx(total, rel=1e-4)

        own = Layout(saved.shapes, stage3=True, world_size=n_ranks)
        state = read(folder / SHARDS, own.shapes, n_ranks - 2, n_ranks)
        assert [t.numel() for t in state.optimizer["fp32_flat_groups"]] == [own.flat_numel(0), own.flat_numel(1)]
        assert state.counters == dict.fromkeys(reshard.COUNTERS, 7)
        plans = [copies(saved, own, rank) for rank in range(n_ranks)]
        n_read = [12 * sum(copy.numel for copy in plan) for plan in plans]  # float32 weights and two moments
        assert reads.total() == n_read[-2]  # what was counted for one rank holds for all: other reads are small
        assert sum(n_read) == 12 * n_parameters

        share, n_shards = total / n_ranks, max(len({copy.shard for copy in plan}) for plan in plans)
        print(f"{n_ranks} ranks: share {share / 1e6:.0f} MB", end=", ")
        print(f"hashed {max(n_hashed) / 1e6:.0f} MB, read {max(n_read) / 1e6:.0f} MB from {n_shards} shards")
        assert max(n_hashed) < 1.1 * share
        assert max(n_read) < 0.8 * share


def test_every_element_is_copied_once_at_any_numbers_of_ranks():
    """Flat tensors with the numbers of their elements, divided over ranks and put together by the copies of other ranks."""
    names = {"a": (7, 3), "b": (1,), "c": (64,), "d": (5,)}
    shapes = {name: torch.Size(shape) for name, shape in names.items()}
    groups = [{n: s for n, s in shapes.items() if n in "ab"}, {n: s for n, s in shapes.items() if n in "cd"}]
    numbers = {name: 100 * i + torch.arange(shape.numel()) for i, (name, shape) in enumerate(shapes.items(), 1)}

    def flat(layout: Layout, rank: int) -> list[torch.Tensor]:
        tensors = [torch.zeros(layout.flat_numel(group), dtype=torch.long) for group in range(len(layout.shapes))]
        for f in layout.fragments(rank):
            tensors[f.group][f.offset : f.offset + f.numel] = numbers[f.name][f.begin : f.begin + f.numel]
        return tensors

    for stage3, n_saved, n_own in product((False, True), (1, 2, 4, 70), (1, 3, 4, 90)):
        saved = Layout(groups, stage3, n_saved)
        own = Layout([shapes] if stage3 and n_own == 1 else groups, stage3, n_own)  # fewer ranks may have other sub-groups
        seen = []
        for rank in range(n_own):
            tensors = [torch.zeros(own.flat_numel(group), dtype=torch.long) for group in range(len(own.shapes))]
            for c in copies(saved, own, rank):
                source = flat(saved, c.shard)[c.source]
                tensors[c.target][c.target_offset : c.target_offset + c.numel] = source[
                    c.source_offset : c.source_offset + c.numel
                ]
            assert all(a.equal(b) for a, b in zip(tensors, flat(own, rank), strict=True))
            seen += [n for tensor in tensors for n in tensor.tolist() if n]
        assert sorted(seen) == sorted(torch.cat(list(numbers.values())).tolist())


@pytest.mark.parametrize(
    ("version", "shapes", "ranks", "message"),
    [
        ("0.20.0", {"w": (8,)}, 2, r"was written by DeepSpeed 0\.20\.0, and only the layout of 0\.19\.x is known"),
        ("0.19.8", {"w": (9,)}, 2, r"has other parameters than the model \(w is the first that differs\); resume it with"),
        ("0.19.8", {"w": (8,), "v": (1,)}, 2, r"\(it has 1, the model 2\)"),
        ("0.19.8", {"w": (8,)}, 3, r"zero_pp_rank_0_.* has another layout than DeepSpeed 0\.19\.x writes"),
    ],
)
def test_unknown_layout_is_one_clear_error(version: str, shapes: dict, ranks: int, message: str, tmp_path: Path):
    written = Layout([{"w": torch.Size((8,))}], stage3=True, world_size=2)
    write_stage3_shards(tmp_path / "checkpoint" / SHARDS, written, 0, version)
    path = tmp_path / "checkpoint" / SHARDS / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save(torch.load(path) | {"dp_world_size": ranks}, path)
    with pytest.raises(CheckpointError, match=message) as e:
        read(path.parent, [{name: torch.Size(shape) for name, shape in shapes.items()}], 0, 1)
    assert str(tmp_path / "checkpoint") in str(e.value)
