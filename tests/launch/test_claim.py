"""Exactly once, without Ray: who may work on a cell when drivers share a storage, or nothing but an MLflow store."""

from pathlib import Path

import pytest

from lmu_dist import records
from lmu_dist.config import Config, parse, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import prepare
from lmu_dist.launch import claim
from lmu_dist.launch.cell import Cell, make_cell
from lmu_dist.launch.claim import BusyError
from lmu_dist.launch.ladder import _run_trunk
from lmu_dist.launch.record import Outcome, read_record, record_of_cell, write_record
from lmu_dist.tracking.store import AwayError, Store, default_uri
from lmu_dist.train.checkpoint import Meta

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def corpus(corpus_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(data(corpus_glob).data, tmp_path_factory.mktemp("prepared"))


def data(corpus_glob: str) -> Config:
    tree = {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}}
    return parse({"experiment": "claims", "data": tree, "train": {"schedule": "wsd", "sequence_tokens": 32}})


@pytest.fixture
def here(corpus_glob: str, corpus: Corpus, tmp_path: Path) -> Cell:
    return make_cell(with_settings(data(corpus_glob), {"storage": str(tmp_path / "here"), "model.n_params": 3000}), corpus)


def moved(cell: Cell, storage: Path) -> Cell:
    return make_cell(with_settings(cell.config, {"storage": str(storage)}), cell.corpus)


def test_cells_of_one_trunk_differ_in_their_tokens_only(here: Cell):
    def with_(**train: object) -> Cell:
        return make_cell(with_settings(here.config, {f"train.{k}": v for k, v in train.items()}), here.corpus)

    longer = with_(tokens=5_000_000)
    assert (longer.trunk, longer.trunk_folder) == (here.trunk, here.trunk_folder)
    assert longer.key != here.key
    assert with_(decay_share=0.1).trunk == here.trunk
    assert with_(learning_rate=0.5).trunk != here.trunk
    assert with_(schedule="cosine").trunk != with_(schedule="cosine", tokens=5_000_000).trunk


def test_a_driver_with_another_storage_waits_while_there_are_signs_of_life(here: Cell, tmp_path: Path):
    store, there = Store(default_uri(tmp_path)), moved(here, tmp_path / "there")
    assert there.key == here.key
    run_id = claim.open_run(here, store, "ladder")
    assert claim.open_run(here, store, "ladder") == run_id
    with pytest.raises(BusyError, match=r"is being run in .*here"):
        claim.open_run(there, store, "ladder")
    store.tag(run_id, {"lmu.alive_ms": "0"})  # silent for long
    assert claim.open_run(there, store, "ladder") == run_id
    with pytest.raises(BusyError, match=r"is being run in .*there"):
        claim.open_run(here, store, "ladder")
    assert len(store.runs("claims")) == 1


def test_of_two_that_begin_at_the_same_moment_not_both_go_on(here: Cell, tmp_path: Path, monkeypatch):
    store = Store(default_uri(tmp_path))
    experiment_id, study_id = store.open_study("claims", "ladder")
    monkeypatch.setattr(store, "find_run", lambda _: None)  # what each saw before either had begun
    store.create_run(experiment_id, study_id, "rival", here.key, str(tmp_path / "there"))
    with pytest.raises(BusyError, match="at the same moment"):
        claim.open_run(here, store, "ladder")
    assert [run.data.tags["lmu.folder"] for run in store.runs_of(here.key)] == [str(tmp_path / "there")]


def test_one_storage_is_held_by_one_driver(here: Cell):
    with claim.alone(here), pytest.raises(BusyError, match="is being run by another process"), claim.alone(here):
        pass


def ended(cell: Cell, status: str) -> None:
    state = Meta(10, cell.key, 2, 1, "", "", "", {}, {})
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_record(cell, record_of_cell(cell, Outcome(status, "undecayed", "rule", state)))


def test_what_a_search_stopped_early_is_not_done_for_a_ladder(here: Cell, tmp_path: Path):
    store = Store(default_uri(tmp_path))
    ended(here, records.STOPPED_EARLY)
    assert claim.find_done(here, store, "ladder") is None
    assert claim.find_done(here, store, "tune", ended=(records.STOPPED_EARLY,)) is not None
    ended(here, records.DIVERGED)
    assert claim.find_done(here, store, "ladder") is not None


def test_a_run_whose_processes_died_is_closed_by_its_driver(here: Cell, tmp_path: Path):
    store = Store(default_uri(tmp_path))
    run_id = claim.open_run(here, store, "ladder")
    claim.close(here, store, records.INTERRUPTED)
    run = store.client.get_run(run_id)
    assert (run.info.status, run.data.tags["lmu.status"]) == ("KILLED", records.INTERRUPTED)
    state = Meta(10, here.key, 2, 1, "", "", "", {}, {}, train_loss_nats=5.5)
    claim.close(here, store, Outcome(records.STOPPED_EARLY, "undecayed", "ASHA: behind", state))
    assert read_record(here).stop_rule == "ASHA: behind"
    run = store.client.get_run(run_id)
    assert run.data.tags["lmu.status"] == records.STOPPED_EARLY
    assert run.data.metrics["final/train_loss_nats"] == 5.5


def test_a_store_that_is_away_makes_a_trunk_wait_and_not_fail(here: Cell, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = "http://127.0.0.1:9"
    with pytest.raises(AwayError):
        Store(away).check()
    assert _run_trunk({"index": 0}, [(here,)], away, {}) == {"busy": True}
