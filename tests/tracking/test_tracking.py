"""The metrics log, its upload to MLflow through outages, and the MLflow store."""

import json
import math
import time
from pathlib import Path

import pytest
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lmu_dist.config import ConfigError, FailedError
from lmu_dist.records import RunRecord
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.new_run import create_run
from lmu_dist.tracking.progress import rows
from lmu_dist.tracking.runs import find_run, record_of, records_of, retire_run
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import open_study, write_plan
from lmu_dist.tracking.upload import MLflowUploader, upload_pending

RECORD = RunRecord(
    **dict.fromkeys(("n_params", "n_params_with_head", "n_params_total", "d_model", "n_blocks", "sequence_tokens"), 1),
    **dict.fromkeys(("vocab_tokens", "planned_tokens", "planned_steps", "batch_tokens", "seed", "tokens", "steps"), 2),
    **dict.fromkeys(("learning_rate", "training_flops_per_token", "training_flops_per_token_kaplan"), 0.1),
    **dict.fromkeys(("train_loss_nats", "val_loss_nats", "val_loss_standard_error_nats", "val_bits_per_byte"), 1 / 3),
    **dict.fromkeys(("family", "schedule", "precision", "data_digest", "code_digest", "stop_rule"), "x"),
    training_seconds=1.5,
    fork_step=3,
    retry_of="",
    key="k",
    status="complete",
    phase="decayed",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(default_uri(tmp_path_factory.mktemp("mlflow")))


@pytest.fixture
def run_id(store: Store, request: pytest.FixtureRequest) -> str:
    experiment_id, study_id = open_study(store, "e", "train")
    return create_run(store, experiment_id, study_id, "cell", request.node.name, "/runs/cell")


@pytest.fixture
def metrics_log(tmp_path: Path, run_id: str) -> MetricsLog:
    return MetricsLog(tmp_path, run_id)


def history(store: Store, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in store.client.get_metric_history(run_id, key)]


def test_study_and_run_are_created_once(store: Store, run_id: str):
    assert open_study(store, "e", "train") == open_study(store, "e", "train")
    run = find_run(store, "test_study_and_run_are_created_once")
    assert run is not None
    assert run.info.run_id == run_id
    assert run.data.tags["mlflow.parentRunId"] == open_study(store, "e", "train")[1]
    assert find_run(store, "another key") is None


def test_entries_are_uploaded_in_order_and_once(store: Store, run_id: str, metrics_log: MetricsLog):
    for step in range(2500):
        metrics_log.log_metrics(step, {"a": step / 7, "b": math.nan if step == 9 else 1.0})
    metrics_log.log_params({"x.y": 0.1, "none": None})
    metrics_log.set_tags({"lmu.t": 1})
    metrics_log.log_dataset("corpus", "d" * 64, "somewhere", {"tokens": 3})
    metrics_log.log_table("curve", {"position": [1, 2], "loss": [0.5, 0.25]})
    metrics_log.end_run("complete")
    upload_pending(metrics_log, store.client)
    metrics_log.mark_uploaded(0)  # as if the position had been lost
    upload_pending(metrics_log, store.client)
    assert history(store, run_id, "a") == [(s, s / 7) for s in range(2500)]
    run = store.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"x.y": "0.1", "none": "None"}
    assert run.data.tags["lmu.t"] == "1"
    assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert {a.path for a in store.client.list_artifacts(run_id)} == {"curve.csv", "curve.json"}
    assert len(json.loads(Path(store.client.download_artifacts(run_id, "curve.json")).read_text())["data"]) == 2
    assert list(metrics_log.pending()) == []


def test_repeated_steps_are_logged_once(store: Store, run_id: str, metrics_log: MetricsLog, tmp_path: Path):
    for step in range(10):
        metrics_log.log_metrics(step, {"loss": float(step)})
    metrics_log.log_metrics(9, {"val": 1.0})
    again = MetricsLog(tmp_path, run_id)  # a new process that resumes from the checkpoint at step 5
    for step in range(5, 15):
        again.log_metrics(step, {"loss": float(step)})
    again.log_metrics(9, {"val": 1.0})
    upload_pending(again, store.client)
    assert history(store, run_id, "loss") == [(s, float(s)) for s in range(15)]
    assert history(store, run_id, "val") == [(9, 1.0)]
    elsewhere = MetricsLog(tmp_path / "another node", run_id, store.last_steps(run_id))
    elsewhere.log_metrics(12, {"loss": 12.0})
    elsewhere = MetricsLog(tmp_path / "another node", run_id)  # and a process on the other node
    for step in range(12, 17):
        elsewhere.log_metrics(step, {"loss": float(step)})
    upload_pending(elsewhere, store.client)
    assert history(store, run_id, "loss") == [(s, float(s)) for s in range(17)]


def test_truncated_line_is_dropped_and_logged_again(store: Store, run_id: str, metrics_log: MetricsLog, tmp_path: Path):
    metrics_log.log_metrics(0, {"loss": 1.0})
    metrics_log.log_metrics(1, {"loss": 2.0})
    content = (tmp_path / "metrics_log.jsonl").read_bytes()
    (tmp_path / "metrics_log.jsonl").write_bytes(content[:-7])
    again = MetricsLog(tmp_path, run_id)
    again.log_metrics(1, {"loss": 2.0})
    upload_pending(again, store.client)
    assert history(store, run_id, "loss") == [(0, 1.0), (1, 2.0)]


def test_outage_delays_upload_and_loses_nothing(
    store: Store, run_id: str, metrics_log: MetricsLog, monkeypatch: pytest.MonkeyPatch
):
    real, calls = MlflowClient.log_batch, []

    def unreliable(self, *arguments, **named):
        calls.append(time.monotonic())
        if len(calls) <= 3:
            raise MlflowException("Connection refused")
        if len(calls) == 5:  # MLflow gets the batch, but the answer is lost
            real(self, *arguments, **named)
            raise MlflowException("Connection reset")
        return real(self, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", unreliable)
    uploader = MLflowUploader(metrics_log, store.uri, interval_seconds=0.02, retry_seconds=0.05)
    began = time.monotonic()
    for step in range(200):
        metrics_log.log_metrics(step, {"loss": float(step)})
        time.sleep(0.002)
    assert time.monotonic() - began < 2
    assert uploader.close(20) == ""
    assert history(store, run_id, "loss") == [(s, float(s)) for s in range(200)]
    assert len(calls) > 5


def first_error(uploader: MLflowUploader) -> str:
    """The error of an upload, as soon as one has failed."""
    while not uploader.last_error:
        time.sleep(0.01)
    return uploader.last_error


def test_uploader_survives_any_error(store: Store, run_id: str, metrics_log: MetricsLog, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("database is locked")))
        metrics_log.log_metrics(0, {"loss": 1.0})
        uploader = MLflowUploader(metrics_log, store.uri, interval_seconds=0.02, retry_seconds=0.05)
        assert "database is locked" in first_error(uploader)
    assert uploader.close(60) == ""
    assert history(store, run_id, "loss") == [(0, 1.0)]


def test_close_in_an_outage_returns_the_error_and_keeps_the_entries(
    store: Store, run_id: str, metrics_log: MetricsLog, monkeypatch, tmp_path: Path
):
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(MlflowException("unreachable")))
        metrics_log.log_metrics(0, {"loss": 1.0})
        uploader = MLflowUploader(metrics_log, store.uri, interval_seconds=0.02, retry_seconds=0.05)
        assert first_error(uploader) in uploader.close(0.3)
        assert "unreachable" in uploader.last_error
    upload_pending(MetricsLog(tmp_path, run_id), store.client)
    assert history(store, run_id, "loss") == [(0, 1.0)]


def test_refused_entries_are_written_to_a_file(store: Store, run_id: str, metrics_log: MetricsLog, tmp_path: Path):
    metrics_log.log_params({"p": 1})
    metrics_log.log_params({"p": 2})  # params are constants
    metrics_log.log_metrics(0, {"good": 0.5})
    metrics_log.log_metrics(0, {"bad*key": 1.0})
    metrics_log.log_metrics(1, {"good": 1.0, "infinite": math.inf})
    upload_pending(metrics_log, store.client)
    assert store.client.get_run(run_id).data.params == {"p": "1"}
    assert history(store, run_id, "good") == [(0, 0.5), (1, 1.0)]
    assert math.isnan(history(store, run_id, "infinite")[0][1])
    refused = [json.loads(line) for line in (tmp_path / "metrics_log.refused.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in refused] == ["params", "metrics"]


def test_entries_of_a_deleted_run_wait_until_it_is_restored(store: Store, run_id: str, metrics_log: MetricsLog, tmp_path: Path):
    metrics_log.log_metrics(0, {"loss": 1.0})
    upload_pending(metrics_log, store.client)
    store.client.delete_run(run_id)
    metrics_log.log_metrics(1, {"loss": 2.0})
    for _ in range(2):
        with pytest.raises(FailedError, match=f"the run was deleted in MLflow, .*`mlflow runs restore --run-id {run_id}`"):
            upload_pending(metrics_log, store.client)
        metrics_log.set_tags({"t": "x"})
    uploader = MLflowUploader(metrics_log, store.uri, interval_seconds=0.02, retry_seconds=0.05)
    assert "the run was deleted in MLflow" in first_error(uploader)
    assert "the run was deleted in MLflow" in uploader.close(0.5)
    assert not (tmp_path / "metrics_log.refused.jsonl").exists()
    store.client.restore_run(run_id)
    upload_pending(MetricsLog(tmp_path, run_id), store.client)
    assert history(store, run_id, "loss") == [(0, 1.0), (1, 2.0)]
    assert store.client.get_run(run_id).data.tags["t"] == "x"


def test_records_are_read_back_unchanged(store: Store, run_id: str, metrics_log: MetricsLog):
    assert record_of(store.client.get_run(run_id)) is None
    metrics_log.log_params(RECORD.columns("params"))
    metrics_log.set_tags(RECORD.columns("tags"))
    metrics_log.log_metrics(2, RECORD.columns("metrics"))
    upload_pending(metrics_log, store.client)
    assert records_of(store, "e")[run_id] == RECORD
    with pytest.raises(ConfigError, match="no experiment 'none'"):
        records_of(store, "none")


def test_progress_rows_have_the_state_of_each_cell(store: Store):
    experiment_id, study_id = open_study(store, "progress", "ladder")
    cells = [{"name": f"cell-{key}", "key": f"p-{key}", "planned_tokens": 100, "n_workers": 2} for key in "abc"]
    write_plan(store, "progress", "ladder", cells)
    run_id = create_run(store, experiment_id, study_id, "cell-a", "p-a", "/runs/a")
    store.client.log_batch(run_id, params=[Param("planned_tokens", "100")])
    store.client.log_metric(run_id, "train/tokens", 40)
    store.client.log_metric(run_id, "speed/tokens_per_second", 20)
    store.client.log_metric(run_id, "train/loss_nats", 4.5)
    store.set_tags(run_id, {"lmu.status": "running"})
    other_id, other_study = open_study(store, "elsewhere", "ladder")
    done = create_run(store, other_id, other_study, "cell-b", "p-b", "/runs/b")
    store.set_tags(done, {"lmu.status": "complete"})
    found = {row.key: row for row in rows(store, "progress")}
    assert [found[f"p-{key}"].state for key in "abc"] == ["running", "complete", "planned"]
    assert (found["p-a"].eta_seconds, found["p-a"].loss_nats) == (3.0, 4.5)
    assert found["p-b"].remark == "in another experiment"
    store.set_tags(run_id, {"lmu.alive_ms": "0"})
    assert {row.key: row.state for row in rows(store, "progress")}["p-a"] == "lost"


def test_retired_run_has_no_key(store: Store, run_id: str, request: pytest.FixtureRequest):
    retire_run(store, run_id)
    assert find_run(store, request.node.name) is None
    assert store.client.get_run(run_id).data.tags["lmu.retired_key"] == request.node.name


def test_unreachable_store_is_a_failure_and_no_wrong_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(FailedError, match=r"MLflow at http://127\.0\.0\.1:9 .* set MLFLOW_TRACKING_URI") as caught:
        find_run(Store("http://127.0.0.1:9"), "k")
    assert not isinstance(caught.value, ConfigError)
