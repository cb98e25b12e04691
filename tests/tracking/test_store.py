"""The MLflow store of other versions, locked, missing, large; and a run that MLflow learns of after it has started."""

import json
import socket
import sqlite3
import time
from pathlib import Path

import mlflow
import pytest
from alembic import command
from alembic.config import Config as AlembicConfig
from mlflow.entities import Experiment
from mlflow.store import db_migrations
from mlflow.store.entities import PagedList
from mlflow.store.tracking.dbmodels.initial_models import Base
from mlflow.tracking import MlflowClient
from sqlalchemy import create_engine

from lmu_dist.cli import main
from lmu_dist.config import ConfigError
from lmu_dist.tracking import address, pages, sqlite_file
from lmu_dist.tracking.errors import BusyError, MLflowUnavailableError, one_line
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.new_run import create_run, find_or_create_run
from lmu_dist.tracking.progress import rows
from lmu_dist.tracking.reports import save_report
from lmu_dist.tracking.run_file import saved_run_id
from lmu_dist.tracking.run_identity import RunIdentity
from lmu_dist.tracking.runs import find_known_runs, find_run, records_of, runs_with_key
from lmu_dist.tracking.store import Store, default_uri, existing_store
from lmu_dist.tracking.studies import end_study, open_study, write_plan
from lmu_dist.tracking.tags import KEY, STUDY
from lmu_dist.tracking.upload import MLflowUploader

MLFLOW_3_10 = "1b5f0d9ad7c1"  # the revision of its tables


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(default_uri(tmp_path))


def make_file_of_revision(path: Path, revision: str) -> None:
    engine = create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(db_migrations.__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_older_store_is_copied_before_it_is_migrated(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store, path = Store(default_uri(tmp_path)), tmp_path / "mlflow.db"
    make_file_of_revision(path, MLFLOW_3_10)
    store.check()
    copy = tmp_path / f"mlflow.db.before-{mlflow.__version__}"
    assert sqlite_file.revision_of(copy) == MLFLOW_3_10
    assert sqlite_file.revision_of(path) not in (MLFLOW_3_10, None)
    [message] = [record.getMessage() for record in caplog.records if record.name == "lmu_dist.tracking.sqlite_file"]
    assert message.startswith(f"{path} was written by an older MLflow; it is copied to {copy}")
    assert find_run(store, "k") is None
    assert {p.name for p in tmp_path.glob("*.before-*")} == {copy.name}


def test_store_of_a_newer_mlflow_is_refused_and_left_alone(tmp_path: Path):
    store, path = Store(default_uri(tmp_path)), tmp_path / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.execute("INSERT INTO alembic_version VALUES ('ffffffffffff')")
    before = path.read_bytes()
    with pytest.raises(
        ConfigError, match=rf"{path} was written by a newer MLflow than the installed .* set MLFLOW_TRACKING_URI"
    ):
        store.check()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mlflow.db"]


def test_commands_that_read_create_nothing(tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"there is no MLflow store in {tmp_path} \(looked for mlflow.db\)"):
        existing_store(default_uri(tmp_path))
    with pytest.raises(ConfigError, match="there is no MLflow store"):
        existing_store(default_uri(tmp_path / "missing"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("htp://x", r"^MLFLOW_TRACKING_URI=htp://x: MLflow has no store at htp://; did you mean http://\?; set it to "),
        ("postgres://u@h/db", r"did you mean postgresql://\?"),
        ("./mlruns", "this is a folder, and MLflow keeps no runs in folders any more"),
        ("file:///mlruns", "this is a folder"),
        ("http:/127.0.0.1:9", "this names no host"),
        ("http://h:port", "port"),
        ("sqlite://x.db", "Invalid SQLite URL: sqlite://x.db; set it"),
        ("postgresql+nothing://u@h/db", "Can't load plugin: sqlalchemy.dialects:postgresql.nothing"),
    ],
)
def test_uri_where_no_store_can_be_is_wrong_input(uri: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        existing_store(uri)
    assert "\n" not in str(caught.value)


def test_file_that_is_no_database_is_wrong_input(tmp_path: Path):
    (tmp_path / "mlflow.db").write_text("not a database\n" * 100)
    with pytest.raises(ConfigError, match=r"set MLFLOW_TRACKING_URI to another store: file is not a database$"):
        Store(default_uri(tmp_path)).check()
    (tmp_path / "folder" / "mlflow.db").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder; set MLFLOW_TRACKING_URI"):
        Store(default_uri(tmp_path / "folder")).check()


def test_server_that_does_not_answer_costs_seconds_and_is_not_asked_again(monkeypatch: pytest.MonkeyPatch):
    began = time.monotonic()
    with pytest.raises(MLflowUnavailableError, match="Connection refused"):
        Store("postgresql+psycopg://u@127.0.0.1:9/db").check()
    assert time.monotonic() - began < 5
    monkeypatch.setattr(address, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("lmu_dist.tracking.store.MIN_OUTAGE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts connections, and never answers
        store = Store(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(MLflowUnavailableError, match="no answer in 0 seconds"):
            store.check()
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(MLflowUnavailableError, match="no answer in 0 seconds"):
                store.check()
        assert time.monotonic() - began < 2  # asked each time it would be 20 seconds
        monkeypatch.setattr(address, "outage_of", lambda _: "asked again")
        messages = list[str]()
        while time.monotonic() - began < 10 and "asked again" not in (messages or [""])[-1]:
            with pytest.raises(MLflowUnavailableError) as caught:
                store.check()
            messages.append(str(caught.value))
            time.sleep(0.02)
        assert messages[-1].endswith("asked again")


def test_store_that_is_deleted_while_in_use_is_named(tmp_path: Path, store: Store):
    store.check()
    (tmp_path / "mlflow.db").unlink()
    with pytest.raises(MLflowUnavailableError, match=rf": {tmp_path}/mlflow.db was deleted while it was in use$"):
        find_run(store, "key")


def test_deleted_experiment_is_not_taken_for_an_empty_one(store: Store, monkeypatch, capsys: pytest.CaptureFixture[str]):
    experiment_id, _ = open_study(store, "e", "train")
    store.client.delete_experiment(experiment_id)
    restore = (
        f"'e' was deleted in MLflow; restore it, with its runs, by `mlflow experiments restore --experiment-id {experiment_id}`"
    )
    for read in (rows, records_of):
        with pytest.raises(ConfigError, match=restore):
            read(store, "e")
    with pytest.raises(ConfigError, match=f"{restore}, or choose another name"):
        open_study(store, "e", "train")


def test_locked_store_is_named_at_once_and_uploaded_to_later(tmp_path: Path, store: Store, monkeypatch, capfd):
    monkeypatch.setattr(sqlite_file, "LOCK_SECONDS", 0.05)
    monkeypatch.setattr("lmu_dist.tracking.upload.OUTAGE_TIMEOUT_SECONDS", 60.0)  # on a busy machine
    (tmp_path / "run").mkdir()
    identity = RunIdentity("e", "ladder", "cell", "key", str(tmp_path / "run"), "me")
    log = MetricsLog(tmp_path / "run", None)
    log.log_metrics(0, {"loss": 1.0})
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE locked (x)")
        connection.commit()
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(MLflowUnavailableError, match=r"mlflow\.db does not answer or fails; .*: database is locked$"):
            store.check()
        with pytest.raises(MLflowUnavailableError, match="database is locked"):
            find_run(store, "key")  # not asked again
        uploader = MLflowUploader(log, store.uri, identity, interval_seconds=0.02, retry_seconds=0.05)
        while not uploader.last_error:
            time.sleep(0.01)
        assert "database is locked" in uploader.last_error
        connection.rollback()
    assert uploader.close(60) == ""
    monkeypatch.setattr(store, "_outage", (-100.0, ""))
    [run] = runs_with_key(store, "key")
    assert saved_run_id(tmp_path / "run", store.uri) == run.info.run_id == log.run_id
    assert (run.data.metrics, run.data.tags["lmu.place"]) == ({"loss": 1.0}, "me")
    assert not any(MetricsLog(tmp_path / "run", run.info.run_id).pending())
    assert capfd.readouterr() == ("", "")
    with pytest.raises(BusyError, match="from me"):
        find_or_create_run(store, RunIdentity("e", "ladder", "cell", "key", "elsewhere", "another driver"))


def test_run_that_mlflow_has_lost_is_made_again(tmp_path: Path, store: Store):
    (tmp_path / "run").mkdir()
    identity = RunIdentity("e", "ladder", "cell", "key", str(tmp_path / "run"), "me")
    log = MetricsLog(tmp_path / "run", "0" * 32)  # of a store that was deleted
    log.log_metrics(0, {"loss": 1.0})
    assert MLflowUploader(log, store.uri, identity, interval_seconds=0.02, retry_seconds=0.05).close(30) == ""
    [run] = runs_with_key(store, "key")
    assert run.data.metrics == {"loss": 1.0}
    assert saved_run_id(tmp_path / "run", store.uri) == run.info.run_id


def test_search_of_experiments_reads_all_pages(store: Store, monkeypatch: pytest.MonkeyPatch):
    def search(self, view_type, page_token=None, **_):
        found = [Experiment(name, name, "", "active") for name in (("1", "2") if page_token is None else ("3",))]
        return PagedList(found, "second page" if page_token is None else None)

    searched = []
    monkeypatch.setattr(MlflowClient, "search_experiments", search)
    monkeypatch.setattr(MlflowClient, "search_runs", lambda self, ids, *_, **__: searched.append(ids) or PagedList([], None))
    find_run(store, "k")
    find_known_runs(store, "new", "digest", 1)
    assert searched == [["1", "2", "3"]] * 2


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "(sqlite3.OperationalError) database is locked\n[SQL: PRAGMA x]\n(Background on this error at: https://sqlalche.me/e/20/e3q8)",
            "database is locked",
        ),
        ("(psycopg.errors.UndefinedTableError) no table (Background on this error at: https://x)", "no table"),
        (
            "(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block if this flush is "
            "occurring prematurely) (sqlite3.OperationalError) no such table: runs\n[SQL: x]",
            "no such table: runs",
        ),
        ("(sqlite3.OperationalError) database or disk is full\n[SQL: x]", "the disk is full; free some space"),
        ("Connection refused\n  by the server", "Connection refused by the server"),
        (
            "API request to http://h:9/api failed with exception HTTPConnectionPool(host='h', port=9): Max retries exceeded "
            'with url: /api (Caused by NewConnectionError("Failed to establish it: [Errno 111] Connection refused"))',
            "[Errno 111] Connection refused",
        ),
    ],
)
def test_errors_of_databases_show_the_reason(message: str, line: str):
    assert one_line(RuntimeError(message)) == line


def test_ended_study_has_a_table_numbers_and_the_answer(tmp_path: Path, store: Store):
    experiment_id, study_id = open_study(store, "e", "ladder")
    cells = [{"name": f"cell-{key}", "key": key, "planned_tokens": 1000, "n_workers": 1} for key in ("a", "b", "c")]
    write_plan(store, "e", "ladder", cells)
    assert store.client.get_run(study_id).info.status == "RUNNING"
    for key, loss in (("a", 5.5), ("b", 5.25)):
        run_id = create_run(store, experiment_id, study_id, f"cell-{key}", key, f"/runs/{key}")
        log = MetricsLog(tmp_path / key, run_id)
        log.log_params({"family": "lmu", "n_params": 3000, "planned_tokens": 1000, "seed": 7})
        log.log_metrics(4, {"final/val_loss_nats": loss, "final/tokens": 1000})
        log.set_tags({"lmu.status": "complete"})
        assert MLflowUploader(log, store.uri).close(20) == ""
    end_study(store, "e", "ladder")
    study = store.client.get_run(study_id)
    assert study.info.status == "FINISHED"
    assert study.data.metrics["study/best_val_loss_nats/lmu"] == 5.25
    assert (study.data.metrics["study/cells"], study.data.metrics["study/complete_cells"]) == (3, 2)
    note = study.data.tags[pages.NOTE]
    assert note.startswith("The study `ladder`: 3 cells, 2 complete, 1 have not started.")
    assert "| lmu | 3,000 | 1,000 | 7 | complete | 5.5000 |  |" in note
    end_study(store, "e", "train")  # there is none
    assert len(store.search_runs([experiment_id], f"tags.`{STUDY}` LIKE '%'")) == 1
    _, other_id = open_study(store, "e", "train")
    end_study(store, "e", "train")  # another study of the experiment has other cells
    assert store.client.get_run(other_id).data.metrics["study/cells"] == 0
    page = tmp_path / "report.html"
    page.write_text("<p>")
    save_report(store, "e", "digest", False, "lmu_over_transformer", [page], {}, {}, "More than 10 times. Because.")
    assert store.client.get_run(study_id).data.tags[pages.NOTE].startswith("**More than 10 times. Because.**\n\nThe study")
    assert [a.path for a in store.client.list_artifacts(study_id, "report")] == ["report/report.html"]
    tags = store.client.get_experiment(experiment_id).tags
    assert "\n\n**More than 10 times. Because.**\n\n" in tags[pages.NOTE]
    assert json.loads(tags[pages.VIEW_TAG])["groupsExpanded"] == {"param.family.lmu": True}
    store.client.set_experiment_tag(experiment_id, pages.NOTE, "my own words")
    end_study(store, "e", "ladder")
    assert store.client.get_experiment(experiment_id).tags[pages.NOTE] == "my own words"
    assert len(store.client.get_metric_history(study_id, "study/cells")) == 1


def test_ui_prints_a_link_to_the_runs_and_saves_the_view_it_names(
    store: Store, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    experiment_id, _ = open_study(store, "e", "ladder")
    store.client.delete_experiment_tag(experiment_id, pages.VIEW_TAG)  # as of an earlier version
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setattr("lmu_dist.tracking.server.serve", lambda store, port, ready: ready(f"http://127.0.0.1:{port}"))
    assert main(["ui", "e", "--port", "5001"]) == 0
    view = "workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=lmu-dist"
    assert capsys.readouterr().out == f"http://127.0.0.1:5001/#/experiments/{experiment_id}/runs?{view}\n"
    saved = json.loads(store.client.get_experiment(experiment_id).tags["mlflow.sharedViewState.lmu-dist"])
    assert [section["name"] for section in saved["compareRunSections"]][:2] == ["val", "train"]
    assert main(["ui", "nothing"]) == 2
    assert "no experiment 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("is_server", [True, False])
def test_all_pages_of_cells_are_read_and_each_once(store: Store, monkeypatch: pytest.MonkeyPatch, is_server: bool):
    experiment = store.client.create_experiment("many")
    for i in range(24):
        tags = {KEY: f"{i % 16:x}{i}"} if i % 8 else {"other": "run"}  # three runs are of no cell
        run = store.client.create_run(experiment, start_time=1000 + i // 6, tags=tags)  # some start at the same time
        store.client.log_param(run.info.run_id, "data_digest", "ab"[i % 2])
    search = MlflowClient.search_runs
    queries = list[str]()

    def small_pages(
        client: MlflowClient, ids: list[str], query: str, *args: int, page_token: str | None = None, **_: int
    ) -> PagedList:
        queries.append(query)
        return search(client, ids, query, *args, max_results=5, page_token=page_token)

    monkeypatch.setattr(MlflowClient, "search_runs", small_pages)
    monkeypatch.setattr(Store, "is_server", is_server)
    assert sorted(run.data.tags[KEY] for run in store.search_cells([experiment])) == sorted(
        f"{i % 16:x}{i}" for i in range(24) if i % 8
    )
    found = store.search_cells([experiment], "params.data_digest = 'b'")
    assert sorted(run.data.tags[KEY] for run in found) == sorted(f"{i % 16:x}{i}" for i in range(1, 24, 2))
    assert any("LIKE 'f%'" in query for query in queries) == is_server
