"""Fixtures: a simulated ladder in an MLflow store and its report, with forecasts, made once for all tests of the report."""

import os
from collections.abc import Iterator

import pytest
from simulate import make_record, simulate_study, write_runs_to_mlflow

from lmu_dist.report.forecasts import make_forecast
from lmu_dist.report.write import ReportFiles, write_report
from lmu_dist.tracking.store import Store, default_uri

EXPERIMENT = "quickstart"
FORECAST_CELL = ("lmu", 1_000_000, 100_000_000)  # its loss was predicted before the two runs of it ended


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(default_uri(tmp_path_factory.mktemp("reported")))
    records = simulate_study(seeds=(0, 1), noise=0.004)
    later = [r for r in records if (r.family, r.n_params, r.tokens) == FORECAST_CELL]
    write_runs_to_mlflow(store.client, EXPERIMENT, [r for r in records if r not in later], curves=True)
    for _ in range(2):  # the second one does not count
        assert make_forecast(store, EXPERIMENT, *FORECAST_CELL).stored is not None
    write_runs_to_mlflow(store.client, EXPERIMENT, later, curves=True)
    bad = make_record("lmu", 10_000, 10**6, 5, 4.0, status="diverged", stop_rule="loss is nan at step 7")
    write_runs_to_mlflow(store.client, EXPERIMENT, [bad, make_record("lmu", 10_000, 10**6, 6, 4.0, phase="undecayed")])
    return store


@pytest.fixture(scope="session")
def written(store: Store, tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    return write_report(store, EXPERIMENT, tmp_path_factory.mktemp("report"), False, lambda *_: None, n_resamples=100)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of this test have no figures, which take half of their time; `written` has them."""
    monkeypatch.setattr("lmu_dist.report.write.draw_figures", lambda *_: [])


@pytest.fixture
def tracking(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    yield store.uri
    os.environ.pop("MLFLOW_TRACKING_URI", None)
