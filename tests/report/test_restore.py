"""A lost store and its tables of records: what is restored equals what was lost, once, however often it is tried."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from csv_rows import read_rows, write_rows
from simulate import make_record, simulate_study, write_runs_to_mlflow

from lmu_dist.cli import main
from lmu_dist.config import ConfigError
from lmu_dist.report.forecasts import make_forecast, score_forecasts
from lmu_dist.report.inputs import TABLES, ReportInputs, inputs_from_mlflow, inputs_from_tables, write_tables
from lmu_dist.report.restore import restore
from lmu_dist.tracking.new_run import create_run
from lmu_dist.tracking.progress import rows
from lmu_dist.tracking.runs import retire_run, runs_of
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import end_study, open_study, write_plan
from lmu_dist.tracking.tags import RESTORED_FROM, RESTORED_RUN

CELL = ("lmu", 1_000_000, 10**8)  # its loss was predicted before it ended


def ignore_progress(*_: object) -> None:
    pass


def inputs_of(store: Store, experiment: str) -> ReportInputs:
    return inputs_from_mlflow(store, experiment, False, ignore_progress)


def study_status(store: Store, experiment: str) -> str:
    return store.client.get_run(open_study(store, experiment, "ladder")[1]).info.status


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A store with runs of many kinds and a scored forecast, and the tables that a report has made of it."""
    folder = tmp_path_factory.mktemp("lost")
    store = Store(default_uri(folder))
    records = simulate_study(("lmu", "transformer"), seeds=(0,), noise=0.004)
    last = [r for r in records if (r.family, r.n_params, r.tokens) == CELL]
    settings = {"train.beta2": 0.99}
    write_runs_to_mlflow(store.client, "e", [r for r in records if r not in last], curves=True, settings=settings)
    assert make_forecast(store, "e", *CELL, n_resamples=20).stored is not None
    assert make_forecast(store, "e", *CELL, n_resamples=20).stored is not None  # a repeated one does not count
    write_runs_to_mlflow(store.client, "e", last, settings=settings)
    others = [
        make_record("lmu", 10_000, 10**6, 5, float("nan"), status="diverged", stop_rule="loss is nan, at step 7"),
        make_record("lmu", 10_000, 10**6, 6, 4.0, status="failed", phase="undecayed"),
        make_record("lmu", 10_000, 10**6, 7, 4.0, status="stopped_early", fork_step=12),
    ]
    ids = write_runs_to_mlflow(store.client, "e", others)
    store.client.set_tag(ids[0], "lmu.family_appearance", '{"title": "Other, \\"LMU\\"", "colour": "#112233"}')
    store.client.set_tag(ids[1], "lmu.n_workers", "2")
    store.client.set_tag(ids[1], "lmu.git_commit", "abc+")
    write_tables(inputs_of(store, "e"), folder)
    return store, folder


@pytest.fixture(scope="module")
def again(lost: tuple[Store, Path], tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(default_uri(tmp_path_factory.mktemp("again")))
    [table] = restore(store, [lost[1] / "runs.csv"], ignore_progress)
    assert (table.n_restored, table.n_known, table.n_forecasts, table.notes) == (53, 0, 2, [])
    assert study_status(store, "e") == "FINISHED"
    return store


def test_the_store_has_what_was_lost(lost: tuple[Store, Path], again: Store):
    ids = {run.data.tags[RESTORED_RUN]: run.info.run_id for run in runs_of(again, "e")}

    def facts(store: Store) -> list[str]:
        stored = inputs_of(store, "e").stored
        runs = [
            replace(run, run_id=ids.get(run.run_id, run.run_id), params=dict(sorted(run.params.items()))) for run in stored.runs
        ]
        return sorted(map(repr, runs))

    assert facts(again) == facts(lost[0])  # records, names, times, workers, commits and settings
    old, new = inputs_of(lost[0], "e"), inputs_of(again, "e")
    assert {ids[run_id]: losses.tolist() for run_id, losses in old.curves.items()} == {
        run_id: losses.tolist() for run_id, losses in new.curves.items()
    }
    assert [replace(f, run_id="") for f in new.forecasts] == [replace(f, run_id="") for f in old.forecasts]
    for run in runs_of(again, "e"):
        before = lost[0].client.get_run(run.data.tags[RESTORED_RUN])
        assert (run.info.status, run.info.start_time, run.info.end_time) == (
            {"complete": "FINISHED", "stopped_early": "KILLED"}.get(run.data.tags["lmu.status"], "FAILED"),
            before.info.start_time,
            before.info.end_time,
        )
        assert run.data.tags[RESTORED_FROM].startswith("runs.csv sha256:")
        assert {key: run.data.tags[key] for key in before.data.tags if key.startswith("lmu.")} == {
            key: text for key, text in before.data.tags.items() if key.startswith("lmu.")
        }


def test_its_tables_differ_by_ids_only(lost: tuple[Store, Path], again: Store, tmp_path: Path):
    """And so do reports, which tables determine: see test_from_tables."""
    old, new = inputs_of(lost[0], "e"), inputs_of(again, "e")
    assert write_tables(new, tmp_path) == list(TABLES)
    ids = {run.data.tags[RESTORED_RUN]: run.info.run_id for run in runs_of(again, "e")}
    ids |= {before.run_id: after.run_id for before, after in zip(old.forecasts, new.forecasts, strict=True)}
    ids[old.study.digest] = new.study.digest  # of the runs with their ids
    for name in TABLES:
        text = (lost[1] / name).read_text()
        for before, after in ids.items():
            text = text.replace(before, after)
        if name == "position_losses.csv":
            assert sorted(text.splitlines()) == sorted((tmp_path / name).read_text().splitlines())
        else:
            assert text == (tmp_path / name).read_text(), name
    scores = score_forecasts(new.study, new.forecasts)
    assert [(score.state, score.counts) for score in scores.scores] == [("scored", True), ("scored", False)]


def test_status_shows_restored_runs(again: Store):
    row = next(row for row in rows(again, "e") if row.state == "complete")
    assert row.tokens == row.planned_tokens
    assert row.loss_nats is not None


def test_restoring_again_adds_nothing(lost: tuple[Store, Path], again: Store):
    def ids() -> list[str]:
        experiments = again.experiment_ids()
        return sorted(run.info.run_id for run in again.search_runs(experiments, ""))

    before = ids()
    retire_run(again, runs_of(again, "e")[0].info.run_id)  # as `ladder --rerun`: it was restored all the same
    [table] = restore(again, [lost[1] / "runs.csv"], ignore_progress)
    assert (table.n_restored, table.n_known, table.n_forecasts) == (0, 53, 0)
    [table] = restore(lost[0], [lost[1] / "runs.csv"], ignore_progress)  # into the store that it is from
    assert (table.n_restored, table.n_forecasts) == (0, 0)
    assert ids() == before


def test_a_restore_that_was_killed_is_completed(lost: tuple[Store, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, calls = Store(default_uri(tmp_path)), list[str]()
    terminate = type(store.client).set_terminated

    def killed(self: object, run_id: str, *arguments: object) -> None:
        calls.append(run_id)
        if len(calls) == 5:
            raise KeyboardInterrupt
        terminate(self, run_id, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(type(store.client), "set_terminated", killed)
    with pytest.raises(KeyboardInterrupt):
        restore(store, [lost[1] / "runs.csv"], ignore_progress)
    monkeypatch.undo()
    n_before = len(runs_of(store, "e"))
    assert 0 < n_before < 5
    assert study_status(store, "e") == "RUNNING"
    [table] = restore(store, [lost[1] / "runs.csv"], ignore_progress)
    assert (table.n_restored, table.n_known, table.n_forecasts) == (53 - n_before, n_before, 2)
    assert study_status(store, "e") == "FINISHED"
    tagged = store.search_runs(store.experiment_ids(), f"tags.`{RESTORED_RUN}` LIKE '%'")
    assert len(tagged) == 53 + 2  # nothing of the incomplete run is left
    assert len({run.data.tags[RESTORED_RUN] for run in tagged}) == 55


def test_runs_of_two_tables(lost: tuple[Store, Path], tmp_path: Path):
    store, found = Store(default_uri(tmp_path)), read_rows(lost[1] / "runs.csv")
    first = write_rows(tmp_path / "a" / "runs.csv", found[:3])
    waiting = dict.fromkeys(found[0], "") | {"name": "w", "status": "planned", "experiment": "other"}
    unfinished = dict.fromkeys(found[0], "") | {"name": "u", "status": "failed", "run_id": "u", "experiment": "other"}
    unfinished["started"] = found[0]["started"]
    shared = [{**row, "experiment": "other", "baseline": "lmu"} for row in found[2:5]]
    second = write_rows(tmp_path / "b" / "table.csv", [*shared, waiting, unfinished])
    tables = restore(store, [first, second], ignore_progress)
    assert [(t.experiment, t.n_restored, t.n_known, t.n_without_result, t.n_not_started) for t in tables] == [
        ("e", 3, 0, 0, 0),
        ("other", 2, 1, 1, 1),
    ]
    assert "2 cells of the table have no result" in tables[1].notes[0]
    stored = inputs_of(store, "other").stored  # with the run that is in the first experiment
    assert (len(stored.runs), stored.baseline) == (3, "lmu")


def test_a_table_made_from_two_restores_into_both(lost: tuple[Store, Path], tmp_path: Path):
    store, found = Store(default_uri(tmp_path)), read_rows(lost[1] / "runs.csv")
    half = len(found) // 2
    others = [{**row, "experiment": "other"} for row in found[:half]]  # so that the first row is not of the first experiment
    waiting = dict.fromkeys(found[0], "") | {"name": "w", "status": "planned", "experiment": "other"}
    paths = [
        write_rows(tmp_path / "a" / "runs.csv", found[half:]),
        write_rows(tmp_path / "b" / "runs.csv", [*others, waiting]),
    ]
    merged = inputs_from_tables(paths)
    (tmp_path / "merged").mkdir()
    write_tables(merged, tmp_path / "merged")
    table = tmp_path / "merged" / "runs.csv"
    experiments = {row["run_id"]: row["experiment"] for row in read_rows(table)}
    assert experiments == {row["run_id"]: row["experiment"] for row in [*found[half:], *others, waiting]}
    again = inputs_from_tables([table])
    assert (again.study.experiment, again.study.digest) == (merged.study.experiment, merged.study.digest)
    assert again.study.experiment == "e, other"
    (tmp_path / "again").mkdir()
    write_tables(again, tmp_path / "again")
    assert (tmp_path / "again" / "runs.csv").read_bytes() == table.read_bytes()
    tables = restore(store, [table], ignore_progress)
    assert {(t.experiment, t.n_restored, t.n_not_started) for t in tables} == {("e", len(found) - half, 0), ("other", half, 1)}
    names = {found.name for found in store.client.search_experiments()}
    assert names - {"Default"} == {"e", "other"}


def test_forecasts_beside_two_tables_are_an_error(lost: tuple[Store, Path], tmp_path: Path):
    store, found, both = Store(default_uri(tmp_path)), read_rows(lost[1] / "runs.csv"), tmp_path / "both"
    first = write_rows(both / "a.csv", found[:3])
    second = write_rows(both / "b.csv", [{**row, "experiment": "other"} for row in found[3:5]])
    (both / "forecasts.csv").write_bytes((lost[1] / "forecasts.csv").read_bytes())
    with pytest.raises(ConfigError, match=r"does not say to which experiment of a.csv, b.csv it belongs: e, other; make a"):
        restore(store, [first, second], ignore_progress)
    assert store.client.get_experiment_by_name("e") is None  # nothing was written
    [table] = restore(store, [first, first], ignore_progress)[:1]
    assert (table.n_restored, table.n_forecasts) == (3, 2)
    write_rows(both / "runs.csv", found[:3])  # the report's own table: the forecasts are its, whatever is beside it
    tables = restore(store, [both / "runs.csv", second], ignore_progress)
    assert [(t.experiment, t.n_restored, t.n_forecasts) for t in tables] == [("e", 0, 0), ("other", 2, 0)]


def test_a_run_of_the_store_that_has_not_ended_is_named(lost: tuple[Store, Path], tmp_path: Path):
    store, row = Store(default_uri(tmp_path)), read_rows(lost[1] / "runs.csv")[0]
    experiment_id = store.client.create_experiment("e", (tmp_path / "artifacts").as_uri())
    run = store.client.create_run(experiment_id, tags={"lmu.key": row["key"], "lmu.status": "interrupted"})
    [table] = restore(store, [write_rows(tmp_path / "runs.csv", [row])], ignore_progress)
    assert (table.n_restored, table.not_ended) == (0, (run.info.run_id,))
    assert study_status(store, "e") == "FINISHED"  # the experiment was there, the study was not
    assert "have not ended, and have a result in the table" in table.notes[0]


def test_the_status_of_a_study_that_was_there(lost: tuple[Store, Path], tmp_path: Path):
    store, found = Store(default_uri(tmp_path)), read_rows(lost[1] / "runs.csv")
    table = write_rows(tmp_path / "runs.csv", found[:2])
    write_plan(store, "e", "ladder", [{"name": "c", "key": "c", "planned_tokens": 1, "n_workers": 1}])
    restore(store, [table], ignore_progress)
    assert study_status(store, "e") == "RUNNING"  # a ladder may be about to start the cell that has no run
    create_run(store, *open_study(store, "e", "ladder"), "c", "c", "/nowhere")
    restore(store, [table], ignore_progress)
    assert study_status(store, "e") == "RUNNING"  # a run that is not restored
    end_study(store, "e", "ladder", "FAILED")
    restore(store, [table], ignore_progress)
    assert study_status(store, "e") == "FAILED"


@pytest.mark.parametrize("column", ["experiment", "name", "started", "ended", "steps", "train_version", "key"])
def test_a_table_that_lacks_a_column_restores_nothing(
    lost: tuple[Store, Path], tmp_path: Path, column: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    found = [{name: text for name, text in row.items() if name != column} for row in read_rows(lost[1] / "runs.csv")]
    table = write_rows(tmp_path / "runs.csv", found)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert main(["restore", str(lost[1] / "runs.csv"), str(table)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"it has no column {column}; a report writes such a table" in error
    assert not (tmp_path / "mlflow.db").exists()


def test_bad_tables_are_one_line(lost: tuple[Store, Path], tmp_path: Path):
    found = read_rows(lost[1] / "runs.csv")

    def error(rows: list[dict[str, str]]) -> str:
        with pytest.raises(ConfigError) as e:
            restore(Store(f"sqlite:///{tmp_path}/mlflow.db"), [write_rows(tmp_path / "runs.csv", rows)], ignore_progress)
        return str(e.value)

    assert "row 1, column name: empty; a run in MLflow needs it" in error([{**found[0], "name": ""}])
    assert "row 2, column started: empty" in error([found[0], {**found[1], "started": ""}])
    assert "row 1, column tokens: 'many' is not a number" in error([{**found[0], "tokens": "many"}])
    (tmp_path / "forecasts.csv").write_bytes((lost[1] / "forecasts.csv").read_bytes())
    assert "does not say to which experiment of runs.csv it belongs: e, f" in error([found[0], {**found[1], "experiment": "f"}])
    assert not (tmp_path / "mlflow.db").exists()


def test_the_command_prints_json(
    lost: tuple[Store, Path], again: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):

    monkeypatch.setenv("MLFLOW_TRACKING_URI", again.uri)
    assert main(["restore", str(lost[1] / "runs.csv"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tables"][0]["experiment"] == "e"
    assert printed["tables"][0]["n_known"] == 53
    assert main(["restore", str(lost[1] / "runs.csv")]) == 0
    assert "e: 0 runs restored from" in capsys.readouterr().out
