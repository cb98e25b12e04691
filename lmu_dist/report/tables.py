"""Tables that belong to runs.csv: forecasts.csv and position_losses.csv. Forecasts and losses in, CSV files out, and back.

For report/inputs. docs/reading-a-report.md lists their columns.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.record_csv import CsvRow, read_csv, write_csv
from lmu_dist.tracking.forecasts import StoredForecast

FORECASTS, POSITIONS = "forecasts.csv", "position_losses.csv"
FORECAST_COLUMNS = tuple(f.name for f in fields(StoredForecast))
MUST_BE_POSITIVE = ("requested_n_params", "n_params", "tokens", "trained_tokens", "loss_nats", "low_nats", "high_nats")


def write_forecast_csv(path: Path, forecasts: Sequence[StoredForecast]) -> None:
    """Writes forecasts, the first made first."""
    write_csv(path, FORECAST_COLUMNS, ({name: _cell(getattr(f, name)) for name in FORECAST_COLUMNS} for f in forecasts))


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    return json.dumps(list(value)) if isinstance(value, tuple) else value


def read_forecast_csv(paths: Sequence[Path]) -> list[StoredForecast]:
    """Reads forecasts, the first made first. One that several tables have counts once. Raises ConfigError for bad cells."""
    found = dict[str, StoredForecast]()
    for path in paths:
        for row in read_csv(path, FORECAST_COLUMNS, "table of forecasts"):
            forecast = _forecast(row)
            found[forecast.run_id] = forecast
    return sorted(found.values(), key=lambda forecast: (forecast.made_ms, forecast.run_id))


def _forecast(row: CsvRow) -> StoredForecast:
    values = dict[str, Any]()
    for f in fields(StoredForecast):
        if f.name == "laws":
            values[f.name] = row.json(f.name, dict)
        elif f.name == "warnings":
            values[f.name] = tuple(row.json(f.name, list))
        elif f.name == "git_commit":
            values[f.name] = row.text(f.name)
        elif (value := row.value(f.name, f.type)) is None:  # pyright: ignore[reportArgumentType]
            raise row.error(f.name, "empty")
        else:
            values[f.name] = value
    for name in MUST_BE_POSITIVE:
        if not values[name] > 0:
            raise row.error(name, f"{row.text(name)!r} is not positive")
    row.time_ms("made")
    return StoredForecast(**values)


def write_position_csv(path: Path, curves: Mapping[str, Floats]) -> None:
    """Writes the loss at positions 1 .. n of runs: a row per run, a column per position."""
    n = max(len(losses) for losses in curves.values())
    rows = ({"run_id": run_id} | dict(zip(_positions(n), losses.tolist(), strict=False)) for run_id, losses in curves.items())
    write_csv(path, ["run_id", *_positions(n)], rows)


def _positions(n: int) -> list[str]:
    return [str(t) for t in range(1, n + 1)]


def read_position_csv(paths: Sequence[Path]) -> dict[str, Floats]:
    """Reads the losses by position of runs, by run id. Raises ConfigError for bad cells."""
    curves = dict[str, Floats]()
    for path in paths:
        for row in read_csv(path, ["run_id", "1"], "table of losses by position"):
            names = _positions(len(row.cells) - 1)
            if unknown := row.cells.keys() - {"run_id", *names}:
                raise row.error(min(unknown), f"unknown; the columns are run_id and the positions 1 to {len(names)}")
            last = max((t for t, name in enumerate(names, 1) if row.text(name)), default=0)
            if last:
                curves[row.text("run_id")] = np.array([_loss(row, name) for name in names[:last]])
    return curves


def _loss(row: CsvRow, column: str) -> float:
    value = row.value(column, float)
    if value is None:
        raise row.error(column, "empty")
    if not 0 <= value < math.inf:
        raise row.error(column, f"{row.text(column)!r} is no loss: a number from 0")
    return value
