"""The record: told once, delivered once, through any outage, and read back as it was."""

import json
import math
import time
from pathlib import Path

import pytest
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lmu_dist.config import ConfigError
from lmu_dist.records import RunRecord
from lmu_dist.tracking.delivery import Courier, deliver
from lmu_dist.tracking.progress import rows
from lmu_dist.tracking.spool import Spool
from lmu_dist.tracking.store import Store, default_uri, record_of

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
    experiment_id, study_id = store.open_study("e", "train")
    return store.create_run(experiment_id, study_id, "cell", request.node.name, "/runs/cell")


@pytest.fixture
def spool(tmp_path: Path, run_id: str) -> Spool:
    return Spool(tmp_path, run_id)


def history(store: Store, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in store.client.get_metric_history(run_id, key)]


def test_study_and_run_are_made_once(store: Store, run_id: str):
    assert store.open_study("e", "train") == store.open_study("e", "train")
    run = store.find_run("test_study_and_run_are_made_once")
    assert run is not None
    assert run.info.run_id == run_id
    assert run.data.tags["mlflow.parentRunId"] == store.open_study("e", "train")[1]
    assert store.find_run("another key") is None


def test_everything_arrives_in_order_and_once(store: Store, run_id: str, spool: Spool):
    for step in range(2500):
        spool.metrics(step, {"a": step / 7, "b": math.nan if step == 9 else 1.0})
    spool.params({"x.y": 0.1, "none": None})
    spool.tags({"lmu.t": 1})
    spool.dataset("corpus", "d" * 64, "somewhere", {"tokens": 3})
    spool.table("curve", {"position": [1, 2], "loss": [0.5, 0.25]})
    spool.end("complete")
    deliver(spool, store.client)
    spool.delivered(0)  # as if the note of it had been lost
    deliver(spool, store.client)
    assert history(store, run_id, "a") == [(s, s / 7) for s in range(2500)]
    run = store.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"x.y": "0.1", "none": "None"}
    assert run.data.tags["lmu.t"] == "1"
    assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert {a.path for a in store.client.list_artifacts(run_id)} == {"curve.csv", "curve.json"}
    assert len(json.loads(Path(store.client.download_artifacts(run_id, "curve.json")).read_text())["data"]) == 2
    assert list(spool.pending()) == []


def test_repeated_steps_are_not_heard_twice(store: Store, run_id: str, spool: Spool, tmp_path: Path):
    for step in range(10):
        spool.metrics(step, {"loss": float(step)})
    spool.metrics(9, {"val": 1.0})
    again = Spool(tmp_path, run_id)  # a new process, from the checkpoint at step 5
    for step in range(5, 15):
        again.metrics(step, {"loss": float(step)})
    again.metrics(9, {"val": 1.0})
    deliver(again, store.client)
    assert history(store, run_id, "loss") == [(s, float(s)) for s in range(15)]
    assert history(store, run_id, "val") == [(9, 1.0)]
    elsewhere = Spool(tmp_path / "another node", run_id, store.last_steps(run_id))
    elsewhere.metrics(12, {"loss": 12.0})
    elsewhere = Spool(tmp_path / "another node", run_id)  # killed there too
    for step in range(12, 17):
        elsewhere.metrics(step, {"loss": float(step)})
    deliver(elsewhere, store.client)
    assert history(store, run_id, "loss") == [(s, float(s)) for s in range(17)]


def test_a_line_torn_by_a_kill_is_told_again(store: Store, run_id: str, spool: Spool, tmp_path: Path):
    spool.metrics(0, {"loss": 1.0})
    spool.metrics(1, {"loss": 2.0})
    content = (tmp_path / "spool.jsonl").read_bytes()
    (tmp_path / "spool.jsonl").write_bytes(content[:-7])
    again = Spool(tmp_path, run_id)
    again.metrics(1, {"loss": 2.0})
    deliver(again, store.client)
    assert history(store, run_id, "loss") == [(0, 1.0), (1, 2.0)]


def test_an_outage_delays_and_loses_nothing(store: Store, run_id: str, spool: Spool, monkeypatch: pytest.MonkeyPatch):
    real, calls = MlflowClient.log_batch, []

    def away(self, *arguments, **named):
        calls.append(time.monotonic())
        if len(calls) <= 3:
            raise MlflowException("Connection refused")
        if len(calls) == 5:  # arrives, but the answer is lost
            real(self, *arguments, **named)
            raise MlflowException("Connection reset")
        return real(self, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", away)
    courier = Courier(spool, store.uri, every_seconds=0.02, retry_seconds=0.05)
    began = time.monotonic()
    for step in range(200):
        spool.metrics(step, {"loss": float(step)})
        time.sleep(0.002)
    assert time.monotonic() - began < 2
    assert courier.close(20) == ""
    assert history(store, run_id, "loss") == [(s, float(s)) for s in range(200)]
    assert len(calls) > 5


def test_no_error_kills_the_courier(store: Store, run_id: str, spool: Spool, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("database is locked")))
        spool.metrics(0, {"loss": 1.0})
        courier = Courier(spool, store.uri, every_seconds=0.02, retry_seconds=0.05)
        assert "database is locked" in courier.close(0.3)
    assert courier.close(10) == ""
    assert history(store, run_id, "loss") == [(0, 1.0)]


def test_closing_while_it_is_away_says_so_and_keeps_the_rest(
    store: Store, run_id: str, spool: Spool, monkeypatch, tmp_path: Path
):
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(MlflowException("away")))
        spool.metrics(0, {"loss": 1.0})
        courier = Courier(spool, store.uri, every_seconds=0.02, retry_seconds=0.05)
        assert "away" in courier.close(0.3)
    assert courier.close(10) == ""
    deliver(Spool(tmp_path, run_id), store.client)
    assert history(store, run_id, "loss") == [(0, 1.0)]


def test_what_mlflow_will_never_take_is_kept_aside(store: Store, run_id: str, spool: Spool, tmp_path: Path):
    spool.params({"p": 1})
    spool.params({"p": 2})  # params are constants
    spool.metrics(0, {"good": 0.5})
    spool.metrics(0, {"bad*key": 1.0})
    spool.metrics(1, {"good": 1.0, "infinite": math.inf})
    deliver(spool, store.client)
    assert store.client.get_run(run_id).data.params == {"p": "1"}
    assert history(store, run_id, "good") == [(0, 0.5), (1, 1.0)]
    assert math.isnan(history(store, run_id, "infinite")[0][1])
    refused = [json.loads(line) for line in (tmp_path / "spool.refused.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in refused] == ["params", "metrics"]


def test_records_are_read_back_as_they_were(store: Store, run_id: str, spool: Spool):
    assert record_of(store.client.get_run(run_id)) is None
    for kind, tell in (("params", spool.params), ("tags", spool.tags)):
        tell(RECORD.columns(kind))
    spool.metrics(2, RECORD.columns("metrics"))
    deliver(spool, store.client)
    assert store.records("e")[run_id] == RECORD
    with pytest.raises(ConfigError, match="no experiment 'none'"):
        store.records("none")


def test_rows_say_what_is_planned_running_lost_and_done(store: Store):
    experiment_id, study_id = store.open_study("progress", "ladder")
    cells = [{"name": f"cell-{key}", "key": f"p-{key}", "planned_tokens": 100, "n_workers": 2} for key in "abc"]
    store.write_plan("progress", "ladder", cells)
    run_id = store.create_run(experiment_id, study_id, "cell-a", "p-a", "/runs/a")
    store.client.log_batch(run_id, params=[Param("planned_tokens", "100")])
    store.client.log_metric(run_id, "train/tokens", 40)
    store.client.log_metric(run_id, "speed/tokens_per_second", 20)
    store.client.log_metric(run_id, "train/loss_nats", 4.5)
    store.tag(run_id, {"lmu.status": "running"})
    other_id, other_study = store.open_study("elsewhere", "ladder")
    done = store.create_run(other_id, other_study, "cell-b", "p-b", "/runs/b")
    store.tag(done, {"lmu.status": "complete"})
    found = {row.key: row for row in rows(store, "progress")}
    assert [found[f"p-{key}"].state for key in "abc"] == ["running", "complete", "planned"]
    assert (found["p-a"].eta_seconds, found["p-a"].loss_nats) == (3.0, 4.5)
    assert found["p-b"].remark == "in another experiment"
    store.tag(run_id, {"lmu.alive_ms": "0"})
    assert {row.key: row.state for row in rows(store, "progress")}["p-a"] == "lost"


def test_a_retired_run_is_no_cell_any_more(store: Store, run_id: str, request: pytest.FixtureRequest):
    store.retire_run(run_id)
    assert store.find_run(request.node.name) is None
    assert store.client.get_run(run_id).data.tags["lmu.retired_key"] == request.node.name


def test_a_store_that_does_not_answer_is_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"MLflow at http://127\.0\.0\.1:9 .* set MLFLOW_TRACKING_URI"):
        Store("http://127.0.0.1:9").find_run("k")
