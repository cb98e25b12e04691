"""What a driver makes of runs that were restored from a table of records: ended cells are done, and no files are expected."""

from pathlib import Path

import pytest
from simulate import write_runs_to_mlflow

from lmu_dist import records
from lmu_dist.config import ConfigError, parse, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import prepare
from lmu_dist.launch import claim, finished
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.clean import clean
from lmu_dist.launch.new_cell import at_half_rate, make_cell
from lmu_dist.launch.record import Outcome, record_of_cell
from lmu_dist.report.inputs import inputs_from_mlflow, write_tables
from lmu_dist.report.restore import restore
from lmu_dist.tracking.names import folder_of
from lmu_dist.tracking.runs import find_known_runs, find_run
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.tags import RESTORED_FROM, RETIRED_KEY
from lmu_dist.train import VERSION
from lmu_dist.train.checkpoint import Meta

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cells(corpus_glob: str, tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    """Four cells: of a storage that is lost."""
    data = {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}}
    config = parse({"experiment": "lost", "data": data, "train": {"schedule": "wsd", "sequence_tokens": 32}})
    corpus: Corpus = prepare(config.data, tmp_path_factory.mktemp("prepared"))
    config = with_settings(config, {"storage": str(tmp_path_factory.mktemp("storage") / "runs"), "model.n_params": 3000})
    return [make_cell(with_settings(config, {"seed": seed, "train.tokens": 10**6}), corpus) for seed in range(4)]


def record_of(cell: Cell, status: str) -> records.RunRecord:
    saved = {"loss_nats": 5.0, "standard_error_nats": 0.1, "bits_per_byte": 2.0, "n_rows": 1, "step": 10}
    meta = Meta(10, cell.key, 1, 1, "", "", "", {}, {}, train_loss_nats=5.5, evaluation={**saved, "position_loss_nats": []})
    return record_of_cell(cell, Outcome(status, "decayed" if status == records.COMPLETE else "undecayed", "", meta))


@pytest.fixture
def store(cells: list[Cell], tmp_path: Path) -> Store:
    """A restored store: a complete cell, one that diverged and its retry, one that was stopped, and none of the last."""
    lost = Store(default_uri(tmp_path / "lost"))
    (tmp_path / "lost").mkdir()
    ended = [
        record_of(cells[0], records.COMPLETE),
        record_of(cells[1], records.DIVERGED),
        record_of(at_half_rate(cells[1]), records.DIVERGED),
        record_of(cells[2], records.STOPPED_EARLY),
    ]
    write_runs_to_mlflow(lost.client, "lost", ended)
    write_tables(inputs_from_mlflow(lost, "lost", False, lambda *_: None), tmp_path)
    found = Store(default_uri(tmp_path))
    restore(found, [tmp_path / "runs.csv"], lambda *_: None)
    return found


def test_restored_cells_that_have_ended_are_done(cells: list[Cell], store: Store):
    known = find_known_runs(store, "another experiment", cells[0].corpus.manifest.data_digest, VERSION)
    found = finished.find_all_finished(cells, store, "ladder", known.by_key())
    assert {key: run.record.status for key, run in found.items()} == {
        cells[0].key: records.COMPLETE,
        cells[1].key: records.DIVERGED,
    }
    assert found[cells[1].key].record.retry_of == cells[1].key
    assert [run.notes for run in found.values()] == [(), ()]
    assert found[cells[0].key].record == record_of(cells[0], records.COMPLETE)


def test_a_restored_run_that_has_not_ended_is_replaced(cells: list[Cell], store: Store):
    restored = find_run(store, cells[2].key)
    run_id = claim.open_run(cells[2], store, "ladder")
    assert restored is not None
    assert run_id not in (None, restored.info.run_id)
    tags = store.client.get_run(restored.info.run_id).data.tags
    assert (tags[RETIRED_KEY], tags["lmu.status"]) == (cells[2].key, "retired")
    new = find_run(store, cells[2].key)
    assert new is not None
    assert new.info.run_id == run_id
    assert new.data.metrics == {}


def test_commands_that_need_files_of_a_restored_run_say_so(cells: list[Cell], store: Store):
    with pytest.raises(ConfigError, match=r"was restored from runs.csv sha256:\w{12}, which has its result but no checkpoint"):
        folder_of(store, cells[0].key[:12])
    found = clean(store, "lost", delete=True)
    assert found.items == ()
    assert found.left == ("4 runs restored from a table of records: without files",)


def test_the_log_of_a_run_that_is_here_after_all_is_not_mixed_with_the_restored_run(cells: list[Cell], store: Store):
    run = find_run(store, cells[0].key)
    assert run is not None
    assert RESTORED_FROM in run.data.tags
    assert not claim.is_run_of(cells[0], run, "this machine")
