"""Forecasts in MLflow: what was predicted of a cell before it ended. For report/forecasts, which makes and scores them.

A forecast is a run of its own in the experiment, with the tag `lmu.forecast`. It has no key, status or folder of a cell and no
parent, so nothing that looks for cells, studies or reports finds it. All that it says are params, which MLflow does not change.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from mlflow.entities import Param, Run, RunTag

from lmu_dist.tracking.experiments import find_experiment
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.tags import FORECAST, RUN_NAME

PREFIX = "forecast."  # of the names of its params


@dataclass(frozen=True)
class StoredForecast:
    """A predicted validation loss of a cell with its interval, in nats per token, and what it was made from.

    The cell is a family, a size and a token budget, as a ladder's configuration has them; `n_params` is the N that a model of
    this size has, without embeddings, and `trained_tokens` the budget in whole batches. `made` is the time in UTC, ISO 8601.
    """

    family: str
    requested_n_params: int
    n_params: int
    tokens: int
    trained_tokens: int
    loss_nats: float
    low_nats: float
    high_nats: float
    level: float  # of the interval, as 0.9
    law: str  # the simplest of the laws
    laws: Mapping[str, float]  # that the prediction averages, with their weights
    n_runs: int  # that the laws were fitted to
    runs_digest: str  # of all runs of the experiment that a report would have used
    cell_state: str  # not started | started: whether the cell was being trained already
    warnings: tuple[str, ...]
    made: str
    lmu_dist: str  # version of the code
    git_commit: str
    run_id: str = ""

    @property
    def made_ms(self) -> int:
        """The time at which it was made, in milliseconds since 1970, as MLflow counts."""
        return int(datetime.fromisoformat(self.made).timestamp() * 1000)

    @property
    def cell_name(self) -> str:
        """The cell in words."""
        return f"{self.family} N={self.requested_n_params:,} D={self.tokens:,}"


def save_forecast(store: Store, experiment: str, forecast: StoredForecast, tags: Mapping[str, str] | None = None) -> str:
    """Saves a forecast as a run of its experiment and returns the run's id. Raises MLflowUnavailableError.

    `tags`: further tags of the run, as of a forecast that is restored.
    """
    params = {f.name: getattr(forecast, f.name) for f in fields(forecast) if f.name != "run_id"}
    texts = {name: json.dumps(_plain(value)) if not isinstance(value, str) else value for name, value in params.items()}
    with store.one_line_errors():
        experiment_id = find_experiment(store, experiment).experiment_id
        all_tags = {RUN_NAME: f"forecast {forecast.cell_name}", **(tags or {})}
        run_id = store.client.create_run(experiment_id, start_time=forecast.made_ms, tags=all_tags).info.run_id
        store.client.log_batch(run_id, params=[Param(f"{PREFIX}{name}", text) for name, text in texts.items()])
        # The tag comes last: a run without it is not found, so that no forecast is read of which a part is missing.
        store.client.log_batch(run_id, tags=[RunTag(FORECAST, forecast.cell_name)])
        store.client.set_terminated(run_id)
    return run_id


def forecasts_of(store: Store, experiment: str) -> list[StoredForecast]:
    """The forecasts of an experiment, the first made first. Raises ConfigError if there is no such experiment."""
    with store.one_line_errors():
        runs = store.search_runs([find_experiment(store, experiment).experiment_id], f"tags.`{FORECAST}` LIKE '%'")
    found = [forecast for run in runs if (forecast := _read(run)) is not None]
    return sorted(found, key=lambda forecast: (forecast.made_ms, forecast.run_id))


def _read(run: Run) -> StoredForecast | None:
    """The forecast of a run; None if another version of lmu-dist has written it differently."""
    values = dict[str, Any]()
    for f in fields(StoredForecast):
        if (text := run.data.params.get(f"{PREFIX}{f.name}")) is not None:
            with suppress(ValueError):
                values[f.name] = text if f.type is str else json.loads(text)
    with suppress(TypeError, ValueError, KeyError):
        values["warnings"] = tuple(values["warnings"])
        forecast = StoredForecast(**values, run_id=run.info.run_id)
        _ = forecast.made_ms
        return forecast
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
