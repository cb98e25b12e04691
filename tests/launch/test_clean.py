"""What `clean` and the end of a run free, and that everything that can still be needed stays. Without Ray."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lmu_dist import records, storage
from lmu_dist.cli import main
from lmu_dist.config import Config, Folder, parse, to_dict, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.manifest import TOKENIZER
from lmu_dist.data.prepare import prepare
from lmu_dist.launch import clean, start_point, tidy
from lmu_dist.launch.cell import BRANCH_POINTS, Cell
from lmu_dist.launch.locks import exclusive_lock, run_identity
from lmu_dist.launch.new_cell import make_cell
from lmu_dist.launch.record import Outcome, record_of_cell, record_path, write_record
from lmu_dist.planning.grid import grid
from lmu_dist.tracking.new_run import create_run_of
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import write_plan
from lmu_dist.train import kept_weights
from lmu_dist.train.checkpoint import (
    SINGLE_PROCESS,
    Meta,
    folder_name,
    newest_branch_point,
    newest_intact,
    upload,
    write_manifest,
)
from lmu_dist.train.export import export, load_trained_model
from lmu_dist.train.kept_weights import WEIGHTS_ONLY, keep_only_weights, newest_model
from lmu_dist.train.model import build_model
from lmu_dist.train.weights import WEIGHTS, read_weights, write_weights

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = 256
EXPERIMENT = "tidy"


@pytest.fixture(scope="module")
def base(corpus_glob: str) -> Config:
    tree = {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}}
    train = {"schedule": "wsd", "sequence_tokens": 32, "batch_tokens": BATCH, "warmup_tokens": 0, "decay_share": 0.5}
    return parse({"experiment": EXPERIMENT, "data": tree, "train": train, "model": {"n_params": 3000}})


@pytest.fixture(scope="module")
def corpus(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(base.data, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(params=["folder", "uri"])
def cells(request: pytest.FixtureRequest, base: Config, corpus: Corpus, tmp_path: Path, bucket: str) -> list[Cell]:
    """Cells of 20, 40, 80 and 160 steps in one trunk: their decays start at steps 10, 20, 40 and 80."""
    where = f"{bucket}/{tmp_path.name}" if request.param == "uri" else str(tmp_path / "storage")
    return cells_in(where, base, corpus)


def cells_in(where: str, base: Config, corpus: Corpus) -> list[Cell]:
    settings = {"storage": where, "cluster.keep_optimizer_state": False}
    return [
        make_cell(with_settings(base, settings | {"train.tokens": n_steps * BATCH}), corpus) for n_steps in (20, 40, 80, 160)
    ]


def write_checkpoint(to: Folder, cell: Cell, step: int, scratch: Path, attempt: str = "a1") -> Folder:
    """Writes a checkpoint of two ranks."""
    folder = to / folder_name(step, 2, attempt)
    for rank in (0, 1):
        local = scratch / f"rank-{rank}"
        (local / "zero").mkdir(parents=True)
        for name in (f"zero/shard-{rank}.pt", "zero_to_fp32.py"):
            (local / name).write_bytes(bytes(10_000))
        if rank == 0:
            manifest = cell.corpus.manifest
            digests = (manifest.data_digest, manifest.tokenizer_digest, cell.code_digest)
            meta = Meta(step, cell.key, 2, 1, *digests, to_dict(cell.config), cell.shape.to_dict(), cell.family_version)
            write_weights(local, meta, build_model(cell.config, cell.shape, torch.device("cpu")).state_dict())
        write_manifest(local, rank, 2)
        upload(local, folder)
        shutil.rmtree(local)
    return folder


def end(cell: Cell, scratch: Path, status: str = records.COMPLETE) -> None:
    """Writes what a run that has ended leaves behind: a branch point, two checkpoints, the tokenizer and the record."""
    train = cell.config.train
    write_checkpoint(cell.trunk_folder / BRANCH_POINTS, cell, train.decay_start, scratch)
    for step in (train.n_steps - 1, train.n_steps):
        write_checkpoint(cell.folder, cell, step, scratch)
    storage.write_atomic(cell.folder / TOKENIZER, (cell.corpus.folder / TOKENIZER).read_bytes())
    state = Meta(train.n_steps, cell.key, 2, 1, "", "", "", {}, {})
    write_record(cell, record_of_cell(cell, Outcome(status, "decayed", "", state)))


def branch_points(cell: Cell) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (cell.trunk_folder / BRANCH_POINTS).iterdir())


def checkpoints(cell: Cell) -> list[int]:
    return sorted(int(path.name[5:13]) for path in cell.folder.glob("step-*"))


def test_a_branch_point_is_used_only_by_cells_that_had_its_rates(base: Config, corpus: Corpus, tmp_path: Path):
    """A budget that is added between two others is one more step of the rate: only the first branch point is shared."""

    def cells(*budgets: int) -> list[Cell]:
        rule = {"value": 0.01, "token_exponent": -0.5, "at_tokens": 20 * BATCH}
        ladder = {"families": ["lmu"], "n_params": [3000], "tokens": [n * BATCH for n in budgets], "learning_rate": rule}
        config = with_settings(base, {"storage": str(tmp_path / "storage"), "ladder": ladder})
        return [make_cell(cell.config, corpus) for cell in grid(config, 400)[0]]

    before, after = cells(20, 80, 160), cells(20, 40, 80, 160)
    assert len({cell.trunk for cell in (*before, *after)}) == 1
    assert before[0].key == after[0].key
    assert not {cell.key for cell in before[1:]} & {cell.key for cell in after[1:]}
    for cell in before[:2]:
        write_checkpoint(cell.trunk_folder / BRANCH_POINTS, cell, cell.config.train.decay_start, tmp_path)

    def found(cell: Cell) -> int | None:
        _, meta = start_point.newest_branch_point(cell, cell.config.train.decay_start, SINGLE_PROCESS)
        return meta and meta.step

    assert [found(cell) for cell in before] == [10, 40, 40]
    assert [found(cell) for cell in after] == [10, 10, 10, 10]
    write_checkpoint(after[2].trunk_folder / BRANCH_POINTS, after[2], 40, tmp_path, "a2")
    assert [found(cell) for cell in after] == [10, 10, 40, 40]
    assert [found(cell) for cell in before] == [10, 40, 40]


def test_the_weights_that_are_kept_restore_a_model_with_the_rates_of_another_size(base: Config, corpus: Corpus, tmp_path: Path):
    settings = {"storage": str(tmp_path / "storage"), "train.tokens": 20 * BATCH, "model.base_n_params": 1000}
    cell = make_cell(with_settings(base, settings), corpus)
    end(cell, tmp_path)
    export(cell.folder, tmp_path / "exported")
    expected, text = build_model(cell.config, cell.shape, torch.device("cpu")), torch.arange(20)[None]
    with torch.no_grad():
        for folder in (cell.folder, tmp_path / "exported"):
            assert torch.equal(load_trained_model(folder).model.logits(text), expected.logits(text))
    ordinary = make_cell(with_settings(base, settings | {"model.base_n_params": None}), corpus)
    assert ordinary.key != cell.key


def test_a_run_that_has_ended_keeps_its_weights_and_its_trunk_what_is_still_needed(cells: list[Cell], tmp_path: Path):
    first, second, third, planned = cells
    for cell in (first, second, third):
        end(cell, tmp_path)
    write_checkpoint(planned.folder, planned, 50, tmp_path)  # it has not ended
    kept = make_cell(with_settings(first.config, {"cluster.keep_optimizer_state": True}), first.corpus)
    tidy.after_run([kept, *cells[1:]])
    assert branch_points(first) == [10, 20, 40]
    assert checkpoints(first) == [19, 20]
    weights = read_weights(first.folder / folder_name(20, 2, "a1"))

    tidy.after_run(cells)
    assert branch_points(first) == [40]  # from which the planned cell starts, and any with more tokens
    assert newest_branch_point(first.trunk_folder / BRANCH_POINTS, 80, 1)[1].step == 40  # pyright: ignore[reportOptionalMemberAccess]
    assert [checkpoints(cell) for cell in cells] == [[], [], [], [50]]
    assert newest_intact(first.folder) == (None, None, [])  # training never starts from weights alone
    folder, meta, skipped = newest_model(first.folder)
    assert (folder, meta and meta.step, skipped) == (first.folder / WEIGHTS_ONLY, 20, [])
    assert read_weights(first.folder / WEIGHTS_ONLY).keys() == weights.keys()
    kept = sorted(path.name for path in (first.folder / WEIGHTS_ONLY).iterdir())
    assert kept == ["manifest-00000.json", "meta.json", WEIGHTS]
    export(first.folder, tmp_path / "exported")  # loads the model, verifies it, and loads it again
    tidy.after_run(cells)  # changes nothing more
    assert newest_model(first.folder)[0] == first.folder / WEIGHTS_ONLY


def test_branch_points_of_cells_that_have_not_ended_stay(base: Config, corpus: Corpus, tmp_path: Path):
    cells = cells_in(str(tmp_path / "storage"), base, corpus)
    first, second, third, fourth = cells
    for cell in (first, third, fourth):
        end(cell, tmp_path)
    tidy.after_run(cells)
    assert branch_points(first) == [10, 80]  # the second cell, whose decay starts at step 20, starts from 10
    write_checkpoint(first.trunk_folder / BRANCH_POINTS, first, 5, tmp_path)
    other = make_cell(with_settings(base, {"storage": first.config.storage, "train.tokens": 30 * BATCH}), corpus)
    write_checkpoint(other.folder, other, 16, tmp_path)  # of another driver's plan
    tidy.after_run(cells)
    assert branch_points(first) == [5, 10, 80]
    end(second, tmp_path, records.STOPPED_EARLY)  # by a search: it can go on
    tidy.after_run(cells)
    assert checkpoints(second) == [39, 40]


def test_nothing_is_deleted_without_intact_weights(base: Config, corpus: Corpus, tmp_path: Path):
    cell = cells_in(str(tmp_path / "storage"), base, corpus)[0]
    end(cell, tmp_path)
    for path in cell.folder.glob(f"step-*/{WEIGHTS}"):
        path.write_bytes(bytes(path.stat().st_size))  # type: ignore[union-attr]
    tidy.after_run([cell])
    assert checkpoints(cell) == [19, 20]
    assert not (cell.folder / WEIGHTS_ONLY).exists()


def test_cleaning_that_is_interrupted_is_completed(
    base: Config, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cell = cells_in(str(tmp_path / "storage"), base, corpus)[0]
    end(cell, tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("copy_file", "write_atomic", "remove"):
        with monkeypatch.context() as patch:
            patch.setattr(kept_weights.storage, function, interrupted)
            with pytest.raises(KeyboardInterrupt):
                keep_only_weights(cell.folder)
        folder, meta, _ = newest_model(cell.folder)
        assert (folder and folder.name, meta and meta.step) == (folder_name(20, 2, "a1"), 20)
    keep_only_weights(cell.folder)
    assert newest_model(cell.folder)[0] == cell.folder / WEIGHTS_ONLY


@pytest.fixture
def experiment(base: Config, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells that have ended, and their runs in MLflow; the command runs in the folder of the store."""
    monkeypatch.chdir(tmp_path)
    store, cells = Store(default_uri(tmp_path)), cells_in(str(tmp_path / "storage"), base, corpus)
    for cell in cells:
        end(cell, tmp_path)
        run_id = create_run_of(store, run_identity(cell, "ladder"))
        store.client.set_tag(run_id, "lmu.status", records.COMPLETE)
    return cells


def test_clean_says_what_it_would_free_and_frees_it_if_asked(experiment: list[Cell], capsys: pytest.CaptureFixture[str]):
    trunk = experiment[0].trunk_folder
    before = storage.n_bytes(trunk)
    assert main(["clean", EXPERIMENT]) == 0
    said = capsys.readouterr()
    assert (said.out.count("optimizer state"), said.out.count("branch point ")) == (4, 3)
    assert "--yes deletes" in said.err
    assert storage.n_bytes(trunk) == before
    assert main(["clean", EXPERIMENT, "--json"]) == 0
    would_free = json.loads(capsys.readouterr().out)
    assert not would_free["deleted"]
    assert main(["clean", EXPERIMENT, "--yes", "--json"]) == 0
    freed = json.loads(capsys.readouterr().out)
    assert freed == would_free | {"deleted": True}
    manifests = sum(path.stat().st_size for path in trunk.glob(f"*/{WEIGHTS_ONLY}/manifest-*"))
    assert before - storage.n_bytes(trunk) == freed["bytes"] - manifests
    assert branch_points(experiment[0]) == [80]
    assert main(["clean", EXPERIMENT]) == 0
    assert "nothing to free" in capsys.readouterr().out


def test_clean_leaves_what_is_in_use_or_planned(experiment: list[Cell], tmp_path: Path, base: Config, corpus: Corpus):
    store, first = Store(default_uri(tmp_path)), experiment[0]
    with exclusive_lock(first):
        found = clean.clean(store, EXPERIMENT, delete=True)
    assert (found.items, found.left) == ((), (f"{first.trunk_folder} is being trained",))
    planned = make_cell(with_settings(base, {"storage": first.config.storage, "train.tokens": 30 * BATCH}), corpus)
    write_plan(store, EXPERIMENT, "ladder", [{"name": planned.name, "key": planned.key}])
    record_path(experiment[1]).unlink()
    found = clean.clean(store, EXPERIMENT, delete=True)
    assert {item.kind for item in found.items} == {tidy.OPTIMIZER_STATE}
    assert branch_points(first) == [10, 20, 40, 80]
    assert [len(checkpoints(cell)) for cell in experiment] == [0, 2, 0, 0]


def test_the_cache_of_the_machine_can_be_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "lmu-dist"
    names = ("files/a.bin", "files/b.bin.partial", "verified/c.json", "local-state/x/metrics_log.jsonl")
    for name in names:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(bytes(1000))
    assert main(["clean", "--cache"]) == 0
    assert "files" in capsys.readouterr().out
    assert all((cache / name).exists() for name in names)
    assert main(["clean", "--cache", "--yes"]) == 0
    assert [name for name in names if (cache / name).exists()] == ["files/b.bin.partial", "local-state/x/metrics_log.jsonl"]
    assert main(["clean"]) == 2
