"""A report from tables of records: the same bytes as from MLflow, without a store, and one clear error for a bad cell."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from csv_rows import read_rows, write_rows
from simulate import make_record, simulate_study, write_runs_to_mlflow

from lmu_dist.cli import main
from lmu_dist.config import ConfigError
from lmu_dist.report.inputs import ReportInputs, inputs_from_mlflow, inputs_from_tables, write_tables
from lmu_dist.report.tables import read_position_csv
from lmu_dist.report.write import ReportFiles, write_report_from_tables
from lmu_dist.scaling.collect import collect
from lmu_dist.scaling.positions import bin_positions, find_plateau
from lmu_dist.scaling.run_csv import read_run_csv
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import write_plan

SAME = ("runs.csv", "forecasts.csv", "position_losses.csv", "results.json", "fits.json")


def ignore_progress(*_: object) -> None:
    pass


def facts(inputs: ReportInputs) -> tuple[str, ...]:
    """All that an analysis reads, as text: NaN is not equal to itself, and texts of floats tell all bits."""
    curves = {run_id: losses.tolist() for run_id, losses in sorted(inputs.curves.items())}
    stored = inputs.stored
    runs = sorted(stored.runs, key=lambda run: run.run_id)
    kept = (stored.experiment, stored.baseline, sorted(stored.not_started), [replace(r, params={}) for r in runs])
    settings = [dict(sorted(run.params.items())) for run in runs]
    return repr(inputs.study), repr(curves), repr(list(inputs.forecasts)), repr(kept), repr(settings)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A store with runs of several settings, some that have not ended, a plan, and cells of another experiment; its tables."""
    folder = tmp_path_factory.mktemp("small")
    store = Store(default_uri(folder))
    records = simulate_study(("lmu", "transformer", "lstm"), (10_000, 100_000), (10**6, 10**7), (0, 1))
    elsewhere, *records = records
    write_runs_to_mlflow(store.client, "first", [elsewhere])
    for i, rate in enumerate((0.005, 0.01, 0.02)):
        family = [replace(r, learning_rate=rate, key=f"{r.key}{i}", val_loss_nats=r.val_loss_nats + i / 7) for r in records]
        settings = {"train.learning_rate": rate, "train.beta2": 0.99, "model.n_params": 10_000 if i else 100_000}
        write_runs_to_mlflow(store.client, 'e, "quoted"', family[i::3], curves=i == 0, settings=settings)
    ended = replace(
        make_record("lmu", 10_000, 10**6, 5, 4.0, status="diverged"), stop_rule='loss is "nan",\nat step 7', tokens=0
    )
    [run_id] = write_runs_to_mlflow(store.client, 'e, "quoted"', [ended])
    store.client.set_tag(run_id, "lmu.family_appearance", '{"title": "Other, \\"LMU\\"", "colour": "#112233"}')
    running = store.client.create_run(
        store.client.get_experiment_by_name('e, "quoted"').experiment_id,  # pyright: ignore[reportOptionalMemberAccess]
        tags={"lmu.key": "k", "lmu.status": "running", "mlflow.runName": "running", "lmu.n_workers": "2"},
    )
    store.client.log_param(running.info.run_id, "train.beta2", "0.9")
    cells = [{"name": "lmu-planned", "key": "p"}, {"name": "elsewhere", "key": elsewhere.key}]
    write_plan(store, 'e, "quoted"', "ladder", cells, "lstm")
    inputs = inputs_from_mlflow(store, 'e, "quoted"', False, ignore_progress)
    write_tables(inputs, folder)
    return store, folder / "runs.csv"


def test_a_report_from_tables_has_the_bytes_of_one_from_mlflow(
    written: ReportFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    again = write_report_from_tables([written.folder / "runs.csv"], tmp_path / "again", False, ignore_progress, n_resamples=100)
    for name in SAME:
        assert (again.folder / name).read_bytes() == (written.folder / name).read_bytes(), name
    assert {path.name for path in again.folder.iterdir()} == {path.name for path in written.folder.iterdir()}
    assert (again.run_id, [path.name for path in tmp_path.iterdir()]) == ("", ["again"])  # no store was made
    assert "lmu-dist report --from runs.csv -o again --json" in (again.folder / "report.html").read_text()


@pytest.mark.parametrize("any_code", [False, True])
def test_tables_have_all_that_is_read_from_mlflow(small: tuple[Store, Path], any_code: bool):
    store, table = small
    from_mlflow = inputs_from_mlflow(store, 'e, "quoted"', any_code, ignore_progress)
    from_tables = inputs_from_tables([table], any_code)
    assert facts(from_tables) == facts(from_mlflow)
    assert from_tables.stored.baseline == "lstm"
    reasons = {out.reason.split(":")[0] for out in from_tables.study.left_out}
    assert {"no result", "not the best settings", "diverged"} <= reasons
    assert from_tables.study.experiment == 'e, "quoted"'
    assert any(run.name.startswith("lmu-10000") and run.run_id for run in from_tables.study.runs)


def test_several_tables_are_one_experiment(small: tuple[Store, Path], tmp_path: Path):
    rows = read_rows(small[1])
    planned, unfinished = [r for r in rows if not r["run_id"]], [r for r in rows if r["name"] == "running"]
    ended = [r for r in rows if r["val_loss_nats"]]
    first = write_rows(tmp_path / "a" / "runs.csv", [*ended[::2], *planned, *unfinished])
    later = {**ended[0], "name": planned[0]["name"], "run_id": "later", "key": "p", "seed": "7"}
    second = write_rows(tmp_path / "b" / "runs.csv", [*ended[1::2], ended[0], later])
    both = read_run_csv([first, second])
    assert [run.run_id for run in both.runs].count(ended[0]["run_id"]) == 1
    assert {run.run_id for run in both.runs} == {r["run_id"] for r in [*ended, *unfinished, later]}
    assert both.not_started == ()  # its run is in the other table
    changed = write_rows(tmp_path / "c" / "runs.csv", [{**ended[0], "val_loss_nats": "3.25"}])
    with pytest.raises(ConfigError, match=r"c/runs.csv, row 1, column val_loss_nats: '3.25', but row 1 of .*a/runs.csv has"):
        read_run_csv([first, changed])


def test_tables_of_earlier_and_later_versions_are_read(small: tuple[Store, Path], tmp_path: Path):
    later = [{**row, "n_experts": "8", "train.new_key": ""} for row in read_rows(small[1])]
    assert read_run_csv([write_rows(tmp_path / "later.csv", later)]) == read_run_csv([small[1]])
    new = ("experiment", "baseline", "started", "ended", "n_workers", "git_commit", "family_appearance", "data.source")
    new += ("gradient_precision", "widths", "unique_tokens", "train.beta2", "train.learning_rate", "model.n_params")
    earlier = [{name: text for name, text in row.items() if name not in new} for row in read_rows(small[1])]
    inputs = inputs_from_tables([write_rows(tmp_path / "earlier.csv", earlier)])
    assert (inputs.study.experiment, inputs.study.source, len(inputs.forecasts)) == ("earlier", "unknown data", 0)
    assert inputs.study.appearances["lmu"].title == "LMU"
    assert all(np.isnan(run.record.epochs) and run.record.widths == "" for run in inputs.study.runs)


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("tokens", "many", "'many' is not a number"),
        ("n_params", "10000.5", "'10000.5' is not a whole number"),
        ("n_params", "-3", "'-3' is not positive"),
        ("tokens", "nan", "'nan' is not a whole number"),
        ("val_loss_nats", "", "empty, although other columns have the result"),
        ("run_id", "", "empty; every run has an id"),
        ("ended", "yesterday", "'yesterday' is not a time with its zone"),
        ("ended", "2026-11-28 01:00", "is not a time with its zone"),
        ("widths", "{20", "'{20' is not JSON"),
        ("family_appearance", '{"colour": "#112233"}', "has no title"),
        ("model.n_params", "ten", "'ten' is not a number"),
        ("train.learning_rate", "fast", "'fast' is not a number"),
        ("status", "", "empty, although other columns have the result"),
        ("n_workers", "two", "'two' is not a number"),
    ],
)
def test_a_bad_cell_is_one_error_with_row_and_column(
    small: tuple[Store, Path], tmp_path: Path, column: str, text: str, message: str
):
    rows = read_rows(small[1])
    rows[2][column] = text
    with pytest.raises(ConfigError, match=rf"bad.csv, row 3, column {column}: .*{message}"):
        read_run_csv([write_rows(tmp_path / "bad.csv", rows)])


def test_tables_that_other_programs_have_written_again(small: tuple[Store, Path], tmp_path: Path):
    text = small[1].read_text().replace(",10000,", ",1e4,")
    assert text != small[1].read_text()
    (tmp_path / "again.csv").write_text(text.replace("\n", "\r\n") + "\r\n")  # with an empty line at the end
    digests = [inputs_from_tables([path]).study.digest for path in (tmp_path / "again.csv", small[1])]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("column", ["planned_tokens", "seed", "learning_rate", "sequence_tokens", "data_digest"])
def test_a_table_without_what_tells_runs_apart_is_an_error(small: tuple[Store, Path], tmp_path: Path, column: str):
    rows = [{name: text for name, text in row.items() if name != column} for row in read_rows(small[1])]
    with pytest.raises(ConfigError, match=f"it has no column {column}"):
        read_run_csv([write_rows(tmp_path / "without.csv", rows)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_id,name,1\na,b,2\n", "column name: unknown; the columns are run_id and the positions 1 to 2"),
        ("run_id,1\na,nan\n", "column 1: 'nan' is no loss"),
        ("run_id,1\na,-1\n", "column 1: '-1' is no loss"),
    ],
)
def test_a_bad_table_of_losses_by_position_is_one_error(tmp_path: Path, text: str, message: str):
    (tmp_path / "position_losses.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_position_csv([tmp_path / "position_losses.csv"])


def test_few_losses_by_position_have_no_plateau(tmp_path: Path):
    (tmp_path / "position_losses.csv").write_text("run_id,1,2\na,3,\nb,,\n")
    curves = read_position_csv([tmp_path / "position_losses.csv"])
    assert {run_id: losses.tolist() for run_id, losses in curves.items()} == {"a": [3.0]}
    assert find_plateau(bin_positions(curves["a"])).determined is False


def test_files_that_are_no_tables_of_records(
    small: tuple[Store, Path], written: ReportFiles, tmp_path: Path, capsys: pytest.CaptureFixture
):
    def error(*arguments: str) -> str:
        assert main(["report", *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    (tmp_path / "table.csv").write_text("n,d,loss\n1,2,3\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    output = ["-o", str(tmp_path / "out")]
    assert "it has no column run_id, family, n_params, tokens" in error("--from", str(tmp_path / "table.csv"), *output)
    assert "it has no column run_id" in error("--from", str(tmp_path / "empty.csv"), *output)
    assert "binary.csv is no table of runs in CSV" in error("--from", str(tmp_path / "binary.csv"), *output)
    assert "none.csv cannot be read: No such file" in error("--from", str(tmp_path / "none.csv"), *output)
    lines = small[1].read_text().splitlines()
    (tmp_path / "short.csv").write_text("\n".join([*lines[:2], lines[2].rpartition(",")[0]]))
    assert "short.csv, row 2, column train.learning_rate: no cell" in error("--from", str(tmp_path / "short.csv"), *output)
    (tmp_path / "header.csv").write_text(lines[0])
    assert "header.csv has no runs" in error("--from", str(tmp_path / "header.csv"), *output)
    forecasts = (written.folder / "forecasts.csv").read_text()
    (tmp_path / "runs.csv").write_bytes((written.folder / "runs.csv").read_bytes())
    (tmp_path / "forecasts.csv").write_text(forecasts.replace(",0.9,", ",most,", 1))
    assert "forecasts.csv, row 1, column level: 'most' is not a number" in error("--from", str(tmp_path / "runs.csv"), *output)
    assert not (tmp_path / "out").exists()
    (tmp_path / "forecasts.csv").write_text(forecasts)
    assert "would replace" in error("--from", str(tmp_path / "runs.csv"), "-o", str(tmp_path))
    assert "one of the two" in error()
    assert "one of the two" in error("e", "--from", str(tmp_path / "runs.csv"))
    assert "--baseline gpt: experiment" in error("--from", str(small[1]), "--baseline", "gpt", *output)


@pytest.mark.usefixtures("no_figures")
def test_a_report_with_another_pair_needs_no_store(
    small: tuple[Store, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    store, table = small
    arguments = ["--baseline", "transformer", "--family", "lstm"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert main(["report", 'e, "quoted"', *arguments, "-o", str(tmp_path / "from_store")]) == 0
    assert "MLflow run" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["report", "--from", str(table), *arguments, "-o", str(tmp_path / "from_table")]) == 0
    assert "MLflow run" not in capsys.readouterr().out
    for name in ("results.json", "fits.json", "position_losses.csv", "runs.csv"):
        assert (tmp_path / "from_table" / name).read_bytes() == (tmp_path / "from_store" / name).read_bytes()
    page = (tmp_path / "from_table" / "report.html").read_text()
    assert "report --from runs.csv -o again --baseline transformer --family lstm" in page
    assert facts(inputs_from_tables([tmp_path / "from_table" / "runs.csv"])) == facts(inputs_from_tables([table]))
    assert collect(store, 'e, "quoted"').digest == inputs_from_tables([table]).study.digest
