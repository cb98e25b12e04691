"""Forecasts in MLflow: read back as they were written, never changed, and never taken for a cell."""

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from simulate import DATA, make_record, write_runs_to_mlflow

from lmu_dist.config import ConfigError
from lmu_dist.tracking.forecasts import StoredForecast, forecasts_of, save_forecast
from lmu_dist.tracking.names import folder_of
from lmu_dist.tracking.progress import rows
from lmu_dist.tracking.reports import reports_of
from lmu_dist.tracking.restored import restored_tags
from lmu_dist.tracking.runs import find_known_runs, records_of, runs_of
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import cells_of

FORECAST = StoredForecast(
    family="lmu",
    requested_n_params=40_000,
    n_params=39_951,
    tokens=400_000,
    trained_tokens=401_408,
    loss_nats=4.123456789012345,
    low_nats=4.1,
    high_nats=4.2,
    level=0.9,
    law="chinchilla",
    laws={"chinchilla": 0.75, "gamma": 0.25},
    n_runs=12,
    runs_digest="d" * 64,
    cell_state="not started",
    warnings=("D is far",),
    made="2026-11-27T20:12:00.123+00:00",
    lmu_dist="0.1.0",
    git_commit="unknown",
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(default_uri(tmp_path))
    write_runs_to_mlflow(store.client, "e", [make_record("lmu", 10_000, 10**6, 0, 4.0)])
    return store


def test_forecasts_are_read_back_unchanged_the_first_first(store: Store):
    later = replace(FORECAST, made="2026-11-27T22:12:00.123+01:00", family="transformer")
    ids = [save_forecast(store, "e", forecast) for forecast in (later, FORECAST)]
    assert forecasts_of(store, "e") == [replace(FORECAST, run_id=ids[1]), replace(later, run_id=ids[0])]
    assert (later.made_ms - FORECAST.made_ms, FORECAST.made_ms) == (3_600_000, 1_795_810_320_123)
    run = store.client.get_run(ids[1])
    assert (run.info.status, run.info.start_time) == ("FINISHED", FORECAST.made_ms)
    assert run.data.tags["lmu.forecast"] == "lmu N=40,000 D=400,000"


def test_a_forecast_cannot_be_changed_afterwards(store: Store):
    run_id = save_forecast(store, "e", FORECAST)
    with pytest.raises(MlflowException, match="Changing param values is not allowed"):
        store.client.log_param(run_id, "forecast.loss_nats", "4.0")


def test_nothing_takes_a_forecast_for_a_cell(store: Store):
    before = [run.info.run_id for run in runs_of(store, "e")]
    run_id = save_forecast(store, "e", FORECAST)
    assert [run.info.run_id for run in runs_of(store, "e")] == list(records_of(store, "e")) == before
    own, elsewhere, waiting = cells_of(store, "e")
    assert ([run.info.run_id for run in own], elsewhere, waiting) == (before, {}, [])
    assert [row.run_id for row in rows(store, "e")] == before
    known = find_known_runs(store, "other", DATA, 0)
    assert [run.info.run_id for run in (*known.own, *(known.elsewhere or []))] == before
    assert reports_of(store, "e") == []
    restored = save_forecast(store, "e", FORECAST, restored_tags(run_id, "runs.csv sha256:0123"))
    for reference in (run_id, restored):
        with pytest.raises(ConfigError, match="no run with this name"):
            folder_of(store, reference)


def test_runs_that_hold_no_whole_forecast_are_skipped(store: Store):
    run_id = save_forecast(store, "e", FORECAST)
    experiment_id = store.client.get_run(run_id).info.experiment_id
    store.client.create_run(experiment_id, tags={"lmu.forecast": "interrupted before its params"})
    assert [forecast.run_id for forecast in forecasts_of(store, "e")] == [run_id]
    with pytest.raises(ConfigError, match="no experiment 'nothing'"):
        forecasts_of(store, "nothing")
