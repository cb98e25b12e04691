"""Forecasts of cells: made from the runs of a report before the cell ends, and scored afterwards."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from simulate import law_of, make_record, simulate_study, write_runs_to_mlflow

from lmu_dist.cli import main
from lmu_dist.report.forecast_cell import find_cell
from lmu_dist.report.forecasts import NOT_SCORED, SCORED, WAITING, ForecastScore, make_forecast, score_forecasts
from lmu_dist.report.write import ReportFiles
from lmu_dist.scaling.collect import LeftOutRun, Run, Study, collect
from lmu_dist.scaling.compare_laws import forms_for
from lmu_dist.scaling.family_laws import rows_with_unique_tokens
from lmu_dist.tracking.forecasts import StoredForecast, forecasts_of
from lmu_dist.tracking.runs import retire_run, runs_of
from lmu_dist.tracking.store import Store, default_uri

CELL = ("--family", "lmu", "--n", "300k", "--tokens", "3e7")


def test_the_report_scores_the_first_forecast_of_a_cell(store: Store, written: ReportFiles):
    first, second = written.forecasts.scores
    forecast = first.forecast
    assert (forecast.family, forecast.n_params, forecast.tokens, forecast.n_runs) == ("lmu", 1_000_000, 100_000_000, 48)
    truth = float(law_of("lmu").loss(1e6, 1e8))
    assert forecast.loss_nats == pytest.approx(truth, rel=0.006)
    assert forecast.low_nats < truth < forecast.high_nats
    assert forecast.high_nats / forecast.low_nats < 1.03
    assert sum(forecast.laws.values()) == pytest.approx(1)
    assert "chinchilla" in forecast.laws
    losses = {run.run_id: run.record.val_loss_nats for run in written.study.runs}
    ended = {run_id: store.client.get_run(run_id).info.end_time or 0 for run_id in losses}
    assert first.actual_nats == losses[first.run_id]
    assert ended[first.run_id] == min(ms for ms in ended.values() if ms > forecast.made_ms)
    assert first.error == pytest.approx(forecast.loss_nats / losses[first.run_id] - 1)
    assert (first.counts, second.counts, second.state) == (True, False, SCORED)
    assert "the first one of the cell counts" in second.remark
    assert (len(written.forecasts.counted), written.forecasts.share_inside) == (1, 1.0)
    facts = json.loads((written.folder / "results.json").read_text())["forecasts"]
    assert (facts["n_forecasts"], facts["n_scored"], facts["share_inside"]) == (2, 1, 1.0)
    assert facts["forecasts"][0]["forecast"]["loss_nats"] == forecast.loss_nats
    metrics = store.client.get_run(written.run_id).data.metrics
    assert (metrics["forecast/scored"], metrics["forecast/share_inside"]) == (1, 1)
    page = (written.folder / "report.html").read_text()
    assert "<b>1 of 1</b> losses (100%) are inside" in page
    assert f"{forecast.loss_nats:.4f}" in page


@pytest.fixture(scope="module")
def one_family(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A study of one family whose law is determined: three sizes, four budgets."""
    store = Store(default_uri(tmp_path_factory.mktemp("one_family")))
    grid = simulate_study(("lmu",), (10_000, 100_000, 1_000_000), (10**6, 5 * 10**6, 2 * 10**7, 10**8), noise=0.002)
    write_runs_to_mlflow(store.client, "e", grid)
    return store


def run_forecast(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = main(["forecast", *arguments])
    output = capsys.readouterr()
    return code, output.out, " ".join(output.err.split())


@pytest.mark.usefixtures("no_figures")
def test_the_command_predicts_and_writes(
    one_family: Store, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_family.uri)
    code, out, _ = run_forecast(capsys, "e", *CELL, "--json")
    facts = json.loads(out)
    assert (code, facts["determined"], facts["n_earlier"], facts["cell_state"]) == (0, True, 0, "not started")
    assert facts["requested_n_params"] == 300_000
    assert 0 < abs(facts["n_params"] - 300_000) < 6_000  # as the planner sizes a model
    assert facts["trained_tokens"] == 30_000_128  # in whole batches of 1,024
    assert facts["loss_nats"] == pytest.approx(float(law_of("lmu").loss(facts["n_params"], 3e7)), rel=0.005)
    assert facts["low_nats"] < facts["loss_nats"] < facts["high_nats"]
    code, out, err = run_forecast(capsys, "e", *CELL)
    assert code == 0
    assert "1 earlier forecast of this cell: the first one counts" in err
    first, second = forecasts_of(one_family, "e")
    assert second.run_id in out
    assert (first.run_id, first.loss_nats) == (facts["run_id"], facts["loss_nats"])
    assert main(["report", "e", "-o", str(tmp_path / "r"), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["forecasts"]
    assert (scored["n_scored"], scored["share_inside"]) == (0, None)
    assert [score["state"] for score in scored["forecasts"]] == [WAITING, WAITING]


def test_what_cannot_be_forecast_is_refused_and_writes_nothing(
    one_family: Store, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_family.uri)
    before = forecasts_of(one_family, "e")
    code, _, err = run_forecast(capsys, "e", "--family", "lmu", "--n", "1e6", "--tokens", "100M")
    assert code == 2
    assert "lmu with N = 1,000,000 and 100,000,000 tokens has ended already (run lmu-1000000-100000000-s0)" in err
    code, _, err = run_forecast(capsys, "e", "--family", "lstm", "--n", "1e6", "--tokens", "1e8")
    assert (code, "has no finished, comparable run of it; it has runs of lmu" in err) == (2, True)
    code, _, err = run_forecast(capsys, "e", "--family", "lmu", "--n", "2", "--tokens", "1e8")
    assert (code, "--n 2: no lmu of 2 blocks has N = 2" in err) == (2, True)
    code, _, err = run_forecast(capsys, "e", "--family", "lmu", "--n", "many", "--tokens", "1e8")
    assert (code, "'many' is not a positive whole number" in err) == (2, True)
    assert forecasts_of(one_family, "e") == before
    small = Store(default_uri(tmp_path))
    write_runs_to_mlflow(small.client, "e", simulate_study(("lmu",), (8_000, 40_000), (10**5, 2 * 10**5, 4 * 10**5), (0, 1)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", small.uri)
    code, out, err = run_forecast(capsys, "e", "--family", "lmu", "--n", "80k", "--tokens", "4e5")
    assert (code, out) == (3, "")
    # On a slow machine the progress of the fits comes before it.
    assert (
        err.rpartition("so far ")[2]
        == "lmu-dist: no forecast: only 2 distinct values of N, but the law needs 3 that differ by 5 % or more"
    )
    assert forecasts_of(small, "e") == []
    for run in runs_of(small, "e"):  # as --rerun does: these losses were seen
        retire_run(small, run.info.run_id)
    study = collect(one_family, "e")
    again = find_cell(small, replace(study, experiment="e"), "lmu", 40_000, 400_000)
    assert "lmu-40000-400000" in again.ended


MADE_MS = 1_795_810_320_000
FORECAST = StoredForecast(
    family="lmu",
    requested_n_params=40_000,
    n_params=39_951,
    tokens=400_000,
    trained_tokens=400_384,
    loss_nats=4.0,
    low_nats=3.9,
    high_nats=4.1,
    level=0.9,
    law="chinchilla",
    laws={"chinchilla": 1.0},
    n_runs=12,
    runs_digest="d" * 64,
    cell_state="not started",
    warnings=(),
    made="2026-11-27T20:12:00+00:00",
    lmu_dist="0.1.0",
    git_commit="unknown",
)


def run_of(loss: float, ended_ms: int, seed: int = 0, planned: int = 400_384, requested: int = 40_000) -> Run:
    record = replace(make_record("lmu", 39_951, planned, seed, loss), batch_tokens=1024)
    return Run(f"run{seed}", f"run{seed}", 39_951, record, (), requested, ended_ms)


def score_of(*runs: Run, left_out: tuple[LeftOutRun, ...] = (), forecast: StoredForecast = FORECAST) -> ForecastScore:
    return score_forecasts(Study("e", "text", runs, left_out, {}, {}), [forecast]).scores[0]


def test_scores():
    outside = score_of(run_of(3.2, MADE_MS + 1))
    assert (outside.state, outside.inside, outside.error) == (SCORED, False, pytest.approx(0.25))
    seeds = score_of(run_of(4.1, MADE_MS + 9, 0), run_of(4.05, MADE_MS + 5, 1))
    assert (seeds.run_id, seeds.inside, seeds.remark) == ("run1", True, "compared with the first of 2 seeds to end")
    assert score_of(run_of(4.1, MADE_MS + 9, 0)).inside  # the ends belong to the interval
    late = score_of(run_of(4.0, MADE_MS), run_of(4.0, MADE_MS + 5, 1))
    assert (late.state, late.actual_nats) == (NOT_SCORED, None)
    assert late.remark == "a run of the cell had ended before the forecast was made"
    other_budget = score_of(run_of(4.0, MADE_MS + 5, planned=401_408))
    assert (other_budget.state, other_budget.remark) == (WAITING, "the cell has not ended")
    record = replace(make_record("lmu", 39_951, 400_384, 0, 9.0), batch_tokens=1024)
    diverged = score_of(left_out=(LeftOutRun("r", "r", "diverged: loss is nan", record),))
    assert (diverged.state, diverged.remark) == (NOT_SCORED, "its run was left out: diverged: loss is nan")
    started = score_of(forecast=replace(FORECAST, cell_state="started", warnings=("far",)))
    assert started.remarks == ["the cell has not ended", "far", "the cell was being trained already"]


def test_the_share_inside_counts_each_cell_once():
    cells = [replace(FORECAST, tokens=tokens) for tokens in (400_000, 800_000, 400_000)]
    runs = run_of(4.0, MADE_MS + 1), run_of(5.0, MADE_MS + 1, 1, planned=800_768)
    scores = score_forecasts(Study("e", "text", runs, (), {}, {}), cells)
    assert [score.inside for score in scores.scores] == [True, False, True]
    assert (len(scores.counted), scores.n_inside, scores.share_inside) == (2, 1, 0.5)
    assert scores.typical_error == pytest.approx(0.1)


def test_unique_tokens_count_only_where_runs_repeat_their_data():
    grid = simulate_study(("lmu",), noise=0.002)
    runs = [Run(f"{i}", f"{i}", r.n_params, replace(r, unique_tokens=10**7)) for i, r in enumerate(grid)]
    rows = rows_with_unique_tokens(runs)
    assert rows.unique_tokens is not None
    assert set(rows.unique_tokens) == {1e7}
    assert "repeated" in {form.__name__.lower() for form in forms_for(rows)}
    once = [replace(run, record=replace(run.record, unique_tokens=10**9)) for run in runs]
    unknown = [replace(runs[0], record=replace(runs[0].record, unique_tokens=0)), *runs[1:]]
    for others in (once, unknown):
        assert rows_with_unique_tokens(others).unique_tokens is None


def test_a_forecast_beyond_the_text_says_that_repeated_tokens_are_counted_as_new(tmp_path: Path):
    store = Store(default_uri(tmp_path))
    grid = simulate_study(("lmu",), (10_000, 100_000, 1_000_000), (10**6, 5 * 10**6, 2 * 10**7, 10**8), noise=0.002)
    write_runs_to_mlflow(store.client, "e", [replace(record, unique_tokens=10**8) for record in grid])
    found = make_forecast(store, "e", "lmu", 1_000_000, 9 * 10**8, n_resamples=100)
    assert found.stored is not None
    assert [w for w in found.stored.warnings if w.startswith("the training reads its data 9 times; no run of the table does")]
