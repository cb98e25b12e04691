"""Exactly-once execution, without Ray: which driver may train a cell when drivers share a storage, or only an MLflow store."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import ANY, MagicMock

import pytest
import torch

from lmu_dist import records
from lmu_dist.config import Config, ConfigError, FailedError, parse, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import prepare
from lmu_dist.launch import claim, trainer
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.ladder_trial import WorkItems
from lmu_dist.launch.locks import exclusive_lock, metrics_log_lock, run_identity
from lmu_dist.launch.metrics_logger import MetricsLogger
from lmu_dist.launch.new_cell import make_cell
from lmu_dist.launch.record import (
    FINAL_STATUSES,
    FinishedRun,
    Outcome,
    read_record,
    record_of_cell,
    record_path,
    write_record,
)
from lmu_dist.launch.run_group import ClaimedRunGroup, skipped_checkpoints
from lmu_dist.tracking.errors import BusyError, MLflowUnavailableError
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.new_run import create_run
from lmu_dist.tracking.run_identity import LoggedRun
from lmu_dist.tracking.runs import runs_of, runs_with_key
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import open_study
from lmu_dist.tracking.upload import upload_pending
from lmu_dist.train import checkpoint
from lmu_dist.train.checkpoint import Meta
from lmu_dist.train.weights import WEIGHTS, write_weights

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def corpus(corpus_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(data(corpus_glob).data, tmp_path_factory.mktemp("prepared"))


def data(corpus_glob: str) -> Config:
    tree = {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}}
    return parse({"experiment": "claims", "data": tree, "train": {"schedule": "wsd", "sequence_tokens": 32}})


@pytest.fixture
def cell(corpus_glob: str, corpus: Corpus, tmp_path: Path) -> Cell:
    return make_cell(with_settings(data(corpus_glob), {"storage": str(tmp_path / "storage-1"), "model.n_params": 3000}), corpus)


def with_storage(cell: Cell, storage: Path) -> Cell:
    return make_cell(with_settings(cell.config, {"storage": str(storage)}), cell.corpus)


def test_cells_of_one_trunk_differ_only_in_tokens(cell: Cell):
    def with_(**train: object) -> Cell:
        return make_cell(with_settings(cell.config, {f"train.{k}": v for k, v in train.items()}), cell.corpus)

    longer = with_(tokens=5_000_000)
    assert (longer.trunk, longer.trunk_folder) == (cell.trunk, cell.trunk_folder)
    assert longer.key != cell.key
    assert with_(decay_share=0.1).trunk == cell.trunk
    assert with_(learning_rate=0.5).trunk != cell.trunk
    assert with_(schedule="cosine").trunk != with_(schedule="cosine", tokens=5_000_000).trunk


def test_driver_with_another_storage_waits_while_heartbeats_are_recent(cell: Cell, tmp_path: Path):
    store, moved_cell = Store(default_uri(tmp_path)), with_storage(cell, tmp_path / "storage-2")
    assert moved_cell.key == cell.key
    run_id = claim.open_run(cell, store, "ladder")
    assert claim.open_run(cell, store, "ladder") == run_id
    with pytest.raises(BusyError, match=r"is being run in .*storage-1"):
        claim.open_run(moved_cell, store, "ladder")
    store.set_tags(run_id, {"lmu.alive_ms": "0"})  # a heartbeat of long ago
    assert claim.open_run(moved_cell, store, "ladder") == run_id
    with pytest.raises(BusyError, match=r"is being run in .*storage-2"):
        claim.open_run(cell, store, "ladder")
    assert len(runs_of(store, "claims")) == 1


def test_two_drivers_that_start_at_the_same_moment_do_not_both_run(cell: Cell, tmp_path: Path, monkeypatch):
    store = Store(default_uri(tmp_path))
    experiment_id, study_id = open_study(store, "claims", "ladder")
    monkeypatch.setattr(claim, "find_run", lambda *_: None)  # what each driver saw before the other created its run
    create_run(store, experiment_id, study_id, "rival", cell.key, str(tmp_path / "storage-2"))
    with pytest.raises(BusyError, match="at the same moment"):
        claim.open_run(cell, store, "ladder")
    assert [run.data.tags["lmu.folder"] for run in runs_with_key(store, cell.key)] == [str(tmp_path / "storage-2")]


def test_second_driver_on_one_storage_is_refused(cell: Cell):
    with (
        exclusive_lock(cell),
        pytest.raises(BusyError, match="is being run by another process"),
        exclusive_lock(cell),
    ):
        pass


def write_ended(cell: Cell, status: str) -> None:
    state = Meta(10, cell.key, 2, 1, "", "", "", {}, {})
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_record(cell, record_of_cell(cell, Outcome(status, "undecayed", "rule", state)))


def test_run_stopped_early_counts_as_ended_only_in_a_search(cell: Cell, tmp_path: Path):
    store = Store(default_uri(tmp_path))
    write_ended(cell, records.STOPPED_EARLY)
    assert claim.find_finished(cell, store, "ladder") is None
    assert claim.find_finished(cell, store, "tune", final_statuses=(records.STOPPED_EARLY,)) is not None
    write_ended(cell, records.DIVERGED)
    assert claim.find_finished(cell, store, "ladder") is not None


def test_driver_closes_a_run_whose_processes_died(cell: Cell, tmp_path: Path):
    store = Store(default_uri(tmp_path))
    run_id = claim.open_run(cell, store, "ladder")
    claim.close_run(cell, store, "ladder", records.INTERRUPTED)
    run = store.client.get_run(run_id)
    assert (run.info.status, run.data.tags["lmu.status"]) == ("KILLED", records.INTERRUPTED)
    state = Meta(10, cell.key, 2, 1, "", "", "", {}, {}, train_loss_nats=5.5)
    claim.close_run(cell, store, "ladder", Outcome(records.STOPPED_EARLY, "undecayed", "ASHA: behind", state))
    assert read_record(cell).stop_rule == "ASHA: behind"
    run = store.client.get_run(run_id)
    assert run.data.tags["lmu.status"] == records.STOPPED_EARLY
    assert run.data.metrics["final/train_loss_nats"] == 5.5


UNREACHABLE = "http://127.0.0.1:9"


def test_trunk_at_a_uri_waits_while_mlflow_is_unavailable(cell: Cell, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cell = make_cell(with_settings(cell.config, {"storage": "memory://runs"}), cell.corpus)
    with pytest.raises(MLflowUnavailableError):  # where only MLflow excludes other drivers
        claim.check_store(Store(UNREACHABLE), cell.config)
    with pytest.raises(MLflowUnavailableError) as raised:
        claim.claim_runs([cell], Store(UNREACHABLE), "ladder", FINAL_STATUSES)
    queue = MagicMock()
    queue.take.remote.return_value = (7, (cell,))
    monkeypatch.setattr("lmu_dist.launch.ladder_trial.ray.get", lambda answer: answer)
    items = WorkItems("group", 2, queue)
    assert items.next() == (cell,)
    items.failed([cell], raised.value)  # busy: the ladder comes back to it
    queue.end.remote.assert_called_once_with(7, ANY, True)


def test_local_run_starts_and_ends_while_mlflow_is_unavailable(cell: Cell, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("lmu_dist.tracking.upload.OUTAGE_TIMEOUT_SECONDS", 0.1)
    absent = Store(UNREACHABLE)
    claim.check_store(absent, cell.config)
    assert claim.find_finished(cell, absent, "ladder") is None
    assert claim.open_run(cell, absent, "ladder") is None
    assert cell.folder.is_dir()
    MetricsLog(cell.folder, None).log_metrics(0, {"loss": 1.0})
    state = Meta(10, cell.key, 2, 1, "", "", "", {}, {}, train_loss_nats=5.5)
    claim.close_run(cell, absent, "ladder", Outcome(records.DIVERGED, "undecayed", "nan", state), 1.0)
    finished = claim.find_finished(cell, absent, "ladder")
    assert finished is not None
    assert finished.run_id == ""
    assert "does not have all metrics" in finished.notes[0]
    store = Store(default_uri(tmp_path))  # MLflow answers again
    finished = claim.find_finished(cell, store, "ladder")
    assert finished is not None
    assert finished.notes == ()
    [run] = runs_with_key(store, cell.key)
    assert run.info.run_id == finished.run_id
    assert (run.data.metrics["loss"], run.data.metrics["final/train_loss_nats"]) == (1.0, 5.5)
    assert run.data.tags["mlflow.parentRunId"] == open_study(store, "claims", "ladder")[1]
    again = claim.find_finished(cell, store, "ladder")
    assert again is not None
    assert again.run_id == finished.run_id


def test_call_of_a_dying_worker_does_not_open_a_closed_log_again(cell: Cell, tmp_path: Path):
    recorder = MetricsLogger(default_uri(tmp_path), {})
    run = LoggedRun(cell.folder, None, run_identity(cell, "train"), {})
    for _ in range(2):  # the run is opened again by its next attempt
        assert recorder.is_free(run)
        recorder.log(run, "log_params", {"a": 1})
        recorder.close(run.folder)
        recorder.log(run, "log_metrics", 0, {"loss": 1.0})
        recorder.flush(run)
        with metrics_log_lock(cell.folder).acquire(timeout=0):
            assert "loss" not in (cell.folder / "metrics_log.jsonl").read_text()


def test_damaged_record_is_named(cell: Cell):
    cell.folder.mkdir(parents=True)
    record_path(cell).write_text('{"family": "lmu"')
    with pytest.raises(
        ConfigError, match=r"record\.json is damaged; delete it, and the run goes on from its newest checkpoint"
    ):
        read_record(cell)


def test_run_whose_checkpoints_are_all_damaged_is_closed_as_failed(cell: Cell, tmp_path: Path, monkeypatch):
    """Its driver was killed, so the run in MLflow is still the running one of that driver."""
    store = Store(default_uri(tmp_path))
    run_id = claim.open_run(cell, store, "train")
    assert run_id is not None
    store.set_tags(run_id, {"lmu.status": records.RUNNING})
    folder = cell.folder / checkpoint.folder_name(10, 1, "a")
    folder.mkdir()
    write_weights(folder, Meta(10, cell.key, 1, 1, "d", "t", "c", {}, {}), {"weight": torch.ones(3)})
    checkpoint.write_manifest(folder, 0, 1)
    assert skipped_checkpoints([cell]) == {cell.key: []}
    monkeypatch.setattr("lmu_dist.launch.run_group.ray.get", lambda answer: answer)
    metrics_logger = MagicMock()
    metrics_logger.close_failed.remote = lambda cells, study: claim.close_failed(cells, store, study)
    (folder / WEIGHTS).write_bytes(bytes((folder / WEIGHTS).stat().st_size))
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged, and no older checkpoint of the run is intact"):
        ClaimedRunGroup([cell], store.uri, "train", metrics_logger)
    run = store.client.get_run(run_id)
    assert (run.data.tags["lmu.status"], run.info.status) == (records.FAILED, "FAILED")


@pytest.mark.parametrize("is_known", [True, False])
def test_metrics_of_two_runs_of_a_cell_do_not_mix(cell: Cell, tmp_path: Path, is_known: bool):
    """Both drivers trained the cell to its end; the first one could not reach MLflow."""
    MetricsLog(cell.folder, None).log_metrics(0, {"loss": 1.0})
    write_ended(cell, records.COMPLETE)
    store, other = Store(default_uri(tmp_path)), with_storage(cell, tmp_path / "storage-2")
    run_id = claim.open_run(other, store, "train")
    MetricsLog(other.folder, run_id).log_metrics(0, {"loss": 2.0})
    write_ended(other, records.COMPLETE)
    known_run = store.client.get_run(run_id) if is_known else None
    for _ in range(2):
        ended = claim.find_finished(cell, store, "train", known_run)
        assert ended is not None
        assert ended.run_id == run_id
        [note] = ended.notes
        assert note.startswith(f"the metrics of {cell.folder} are not in MLflow, which has another run of the cell, from ")
        assert f"delete that run (`mlflow runs delete --run-id {run_id}`)" in note
    assert store.client.get_metric_history(run_id, "loss") == []
    ended = claim.find_finished(other, store, "train", known_run)
    assert ended is not None
    assert ended.notes == ()
    assert [m.value for m in store.client.get_metric_history(run_id, "loss")] == [2.0]
    store.client.delete_run(run_id)
    ended = claim.find_finished(cell, store, "train")
    assert ended is not None
    assert ended.notes == ()
    assert [m.value for m in store.client.get_metric_history(ended.run_id, "loss")] == [1.0]


def test_train_ends_its_study_however_it_ends(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = default_uri(tmp_path)
    store = Store(uri)
    seen = list[str]()

    def status() -> str:
        return store.client.get_run(open_study(store, "claims", "train")[1]).info.status

    def train_that(end: Callable[[], FinishedRun]) -> None:
        def train_cell(*_: object) -> FinishedRun:
            seen.append(status())
            return end()

        monkeypatch.setattr(trainer, "_train", train_cell)
        trainer.train(cell.config, uri)

    def fail(error: BaseException) -> FinishedRun:
        raise error

    monkeypatch.setattr(trainer, "check_before_start", lambda _: None)
    monkeypatch.setattr(trainer, "prepare_corpus", lambda *_: cell.corpus)
    monkeypatch.setattr(trainer, "cluster", lambda _: nullcontext())
    for error, ends_as in ((KeyboardInterrupt(), "KILLED"), (FailedError("x"), "FAILED"), (BusyError("x"), "RUNNING")):
        with pytest.raises(type(error)):
            train_that(lambda error=error: fail(error))
        assert status() == ends_as
    write_ended(cell, records.DIVERGED)
    diverged = claim.find_finished(cell, store, "train")
    assert diverged is not None
    record_path(cell).unlink()
    train_that(lambda: diverged)
    assert seen == ["RUNNING"] * 4
    assert status() == "FAILED"
    write_ended(cell, records.COMPLETE)
    trainer.train(cell.config, uri)  # as if an earlier command was killed before it ended the study
    assert (status(), len(seen)) == ("FINISHED", 4)


def test_run_that_is_taken_over_and_back_has_each_step_once(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(claim, "CLAIM_SECONDS", 0.01)
    store, other = Store(default_uri(tmp_path)), with_storage(cell, tmp_path / "storage-2")
    run_id = claim.open_run(cell, store, "train")

    def log_steps(folder: Path, steps: range, last_steps: dict[str, int] | None = None) -> MetricsLog:
        log = MetricsLog(folder, run_id, last_steps)
        for step in steps:
            log.log_metrics(step, {"loss": float(step)})
        return log

    upload_pending(log_steps(cell.folder, range(3)), store.client)
    log_steps(cell.folder, range(3, 6))  # not uploaded: the machine died
    store.set_tags(run_id, {"lmu.alive_ms": "0"})
    assert claim.open_run(other, store, "train") == run_id
    upload_pending(log_steps(other.folder, range(1, 8), store.last_steps(run_id)), store.client)
    store.set_tags(run_id, {"lmu.alive_ms": "0"})
    assert claim.open_run(cell, store, "train") == run_id
    upload_pending(log_steps(cell.folder, range(4, 10)), store.client)  # from its own checkpoint
    points = store.client.get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in points] == [(step, float(step)) for step in range(10)]
