"""What a ladder's driver reads to know which cells have ended, without Ray: the same for few and for many finished cells."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from lmu_dist import records
from lmu_dist.config import Config, parse, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import prepare
from lmu_dist.launch import claim, finished, ladder_driver
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.ladder_driver import LadderDriver
from lmu_dist.launch.ladder_state import LadderState
from lmu_dist.launch.new_cell import at_half_rate, make_cell
from lmu_dist.launch.record import FinishedRun, Outcome, log_result, log_start, record_of_cell, record_path, write_record
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.pages import NOTE
from lmu_dist.tracking.runs import find_known_runs
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import open_study
from lmu_dist.tracking.upload import upload_pending
from lmu_dist.train import VERSION
from lmu_dist.train.checkpoint import Meta

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def corpus(corpus_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(data(corpus_glob).data, tmp_path_factory.mktemp("prepared"))


def data(corpus_glob: str) -> Config:
    tree = {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}}
    return parse({"experiment": "many", "data": tree, "train": {"schedule": "wsd", "sequence_tokens": 32}})


@pytest.fixture
def cells(corpus_glob: str, corpus: Corpus, tmp_path: Path, machine: Callable[[str], None]) -> list[Cell]:
    """Six cells of two trunks."""
    config = with_settings(data(corpus_glob), {"storage": str(tmp_path / "runs"), "model.n_params": 3000})
    settings = [{"seed": seed, "train.tokens": tokens} for seed in (0, 1) for tokens in (10**6, 2 * 10**6, 3 * 10**6)]
    return [make_cell(with_settings(config, changed), corpus) for changed in settings]


def end(cell: Cell, store: Store, status: str = records.COMPLETE, uploads: bool = True) -> str:
    """Makes the run of a cell that has ended. Returns its id."""
    run_id = claim.open_run(cell, store, "ladder")
    assert run_id is not None
    log = MetricsLog(cell.folder, run_id)
    log_start(cell, log)
    record = record_of_cell(
        cell, Outcome(status, "decayed", "", Meta(10, cell.key, 1, 1, "", "", "", {}, {}, train_loss_nats=5.5))
    )
    log_result(record, None, log)
    log.end_run(status)
    write_record(cell, record)
    if uploads:
        upload_pending(log, store.client)
    return run_id


def find(cells: list[Cell], store: Store) -> dict[str, FinishedRun]:
    known = find_known_runs(store, "many", cells[0].corpus.manifest.data_digest, VERSION)
    return finished.find_all_finished(cells, store, "ladder", known.by_key())


def test_finished_cells_cost_no_request_and_no_file_each(cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, requests, opened = Store(default_uri(tmp_path)), Counter[str](), list[str]()
    shown = list[tuple[Any, ...]]()

    def count(name: str) -> None:
        original = getattr(MlflowClient, name)
        monkeypatch.setattr(MlflowClient, name, lambda *a, **kw: requests.update([name]) or original(*a, **kw))

    for name in ("search_runs", "get_run", "search_experiments", "get_experiment_by_name", "log_batch"):
        count(name)
    monkeypatch.setattr(finished, "record_path", lambda cell: opened.append("record") or record_path(cell))
    for name in ("MetricsLog", "read_record"):
        monkeypatch.setattr(claim, name, lambda *_, name=name: pytest.fail(f"{name} of a finished run"))
    costs = list[dict[str, int]]()
    for n_finished in (2, 6):
        for cell in cells[:n_finished]:
            if not record_path(cell).exists():
                end(cell, store)
        requests.clear()
        driver = LadderDriver(LadderState(cells[:n_finished], store), lambda *line: shown.append(line))
        state = driver.state
        assert len(state.finished) == n_finished
        assert state.missing() == []
        assert {run.record.train_loss_nats for run in state.finished.values()} == {5.5}
        assert state.result(()).notes == ()
        monkeypatch.setattr(
            ladder_driver, "record_path", lambda _: pytest.fail("a tick looks for the record of a finished run")
        )
        driver.report_progress()
        assert shown.pop() == ("ladder", n_finished, n_finished, f"{n_finished} of {n_finished} cells ended")
        costs.append(dict(requests))
    assert costs[0] == costs[1]
    assert opened == []


def test_cells_that_ended_since_are_counted_by_the_progress(cells: list[Cell], tmp_path: Path):
    store, shown = Store(default_uri(tmp_path)), list[int]()
    end(cells[0], store)
    driver = LadderDriver(LadderState(cells, store), lambda _, done, *__: shown.append(int(done)))
    driver.report_progress()
    driver.note_ended(cells[:2])
    driver.report_progress()
    cells[2].folder.mkdir(parents=True)
    write_record(cells[2], record_of_cell(cells[2], None))
    driver._note_records(cells[:4])  # of a trunk that is running
    driver.report_progress()
    assert shown == [1, 2, 3]


def test_what_mlflow_lacks_of_a_finished_run_is_uploaded(cells: list[Cell], tmp_path: Path):
    store = Store(default_uri(tmp_path))
    run_ids = [end(cell, store, uploads=i > 0) for i, cell in enumerate(cells[:2])]
    state = LadderState(cells, store)
    assert {run.run_id for run in state.finished.values()} == set(run_ids)
    assert state.runs_for_study() is None  # the listing is from before the upload
    assert store.client.get_run(run_ids[0]).data.metrics["final/train_loss_nats"] == 5.5
    state.refresh()
    known = state.runs_for_study()
    assert known is not None
    claim.end_study(store, cells[0].config, "ladder", known=known)
    note = store.client.get_run(open_study(store, "many", "ladder")[1]).data.tags[NOTE]
    assert "The study `ladder`: 2 cells, 2 complete." in note


def test_retry_counts_for_a_cell_that_diverged(cells: list[Cell], tmp_path: Path):
    store = Store(default_uri(tmp_path))
    end(cells[0], store, records.DIVERGED)
    assert find(cells, store) == {}
    end(at_half_rate(cells[0]), store)
    [found] = find(cells, store).values()
    assert (found.record.retry_of, found.record.status) == (cells[0].key, records.COMPLETE)


def test_finished_run_of_another_storage_has_a_note(cells: list[Cell], tmp_path: Path):
    store = Store(default_uri(tmp_path))
    elsewhere = make_cell(with_settings(cells[0].config, {"storage": str(tmp_path / "other")}), cells[0].corpus)
    run_id = end(elsewhere, store)
    [found] = find(cells, store).values()
    assert (found.run_id, len(found.notes)) == (run_id, 1)
    assert "which is not here; to train it again delete the run in MLflow" in found.notes[0]
    MetricsLog(cells[0].folder, None).log_metrics(0, {"loss": 1.0})  # trained here too, while MLflow was away
    write_record(cells[0], record_of_cell(cells[0], Outcome(records.COMPLETE, "", "", Meta(1, "", 1, 1, "", "", "", {}, {}))))
    [found] = find(cells, store).values()
    assert "are not in MLflow, which has another run of the cell" in found.notes[0]
