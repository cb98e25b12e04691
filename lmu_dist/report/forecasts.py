"""Predicts the loss of cells before they have ended, and scores it afterwards: a store and a cell in, forecasts out.

A forecast is made from the runs that a report of the experiment would use, and is written to MLflow before the cell ends. The
report compares it with the run that ends next. A forecast that was made after a run of the cell had ended is refused.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from lmu_dist import __version__
from lmu_dist.config import ConfigError
from lmu_dist.report.forecast_cell import STARTED, ForecastCell, find_cell, runs_of_cell
from lmu_dist.scaling.collect import Study, collect
from lmu_dist.scaling.family_laws import compare_family_laws, missing_runs, most_unique_tokens
from lmu_dist.scaling.forecast import N_RESAMPLES, predict_from
from lmu_dist.scaling.intervals import CONFIDENCE
from lmu_dist.scaling.table import is_budget
from lmu_dist.tracking.forecasts import StoredForecast, forecasts_of, save_forecast
from lmu_dist.tracking.store import Store

SCORED, WAITING, NOT_SCORED = "scored", "waiting", "not scored"
SAME_SIZE = 0.02  # relative deviation of N within which a run that was left out may be of the cell


@dataclass(frozen=True)
class NewForecast:
    """What a forecast came to. `stored` is None if no law is determined; `reasons` says why, and nothing was written then."""

    cell: ForecastCell
    stored: StoredForecast | None
    reasons: tuple[str, ...]
    n_earlier: int  # forecasts of the same cell that were made before; only the first one counts


@dataclass(frozen=True)
class ForecastScore:
    """A forecast and what came of it. `counts`: it is the first of its cell. Errors are predicted over actual loss, minus 1."""

    forecast: StoredForecast
    counts: bool
    state: str  # SCORED, WAITING or NOT_SCORED
    remark: str = ""
    run_id: str = ""
    actual_nats: float | None = None
    error: float | None = None
    inside: bool | None = None

    @property
    def remarks(self) -> list[str]:
        """All that a reader should know of it."""
        started = ["the cell was being trained already"] if self.forecast.cell_state == STARTED else []
        return [*([self.remark] if self.remark else []), *self.forecast.warnings, *started]


@dataclass(frozen=True)
class ForecastScores:
    """All forecasts of an experiment, the first made first. Numbers are over the first forecast of each cell."""

    scores: tuple[ForecastScore, ...] = ()

    @property
    def counted(self) -> list[ForecastScore]:
        """The forecasts that are scored and count."""
        return [score for score in self.scores if score.counts and score.state == SCORED]

    @property
    def n_inside(self) -> int:
        """How many actual losses are inside of their intervals."""
        return sum(bool(score.inside) for score in self.counted)

    @property
    def share_inside(self) -> float | None:
        """The share of the actual losses that are inside of their intervals; None if no forecast is scored."""
        return self.n_inside / len(self.counted) if self.counted else None

    @property
    def typical_error(self) -> float | None:
        """The median of the absolute errors."""
        return (
            statistics.median(abs(score.error) for score in self.counted if score.error is not None) if self.counted else None
        )

    def to_json(self) -> dict[str, Any]:
        """The scores for results.json."""
        return {
            "n_forecasts": len(self.scores),
            "n_scored": len(self.counted),
            "n_inside": self.n_inside,
            "share_inside": self.share_inside,
            "median_absolute_error": self.typical_error,
            "forecasts": [asdict(score) for score in self.scores],
        }


def make_forecast(
    store: Store,
    experiment: str,
    family: str,
    n_params: int,
    tokens: int,
    git_commit: str = "unknown",
    n_resamples: int = N_RESAMPLES,
) -> NewForecast:
    """Predicts the loss of a cell and writes the forecast to MLflow.

    Raises ConfigError if a run of the cell has ended, if the experiment has no run that can be used, or none of the family.
    """
    study = collect(store, experiment)
    cell = find_cell(store, study, family, n_params, tokens)
    if cell.ended:
        raise ConfigError(
            f"{cell.family} with N = {n_params:,} and {tokens:,} tokens has ended already (run {cell.ended}), so its loss is "
            "known; forecast a cell that has not ended"
        )
    runs = study.runs_of(cell.family)
    earlier = [f for f in forecasts_of(store, experiment) if _cell_key(f) == (cell.family, n_params, tokens)]
    if reasons := missing_runs(runs):
        return NewForecast(cell, None, tuple(reasons), len(earlier))
    comparison = compare_family_laws(runs)
    tokens_of_cell, unique = float(cell.trained_tokens), most_unique_tokens(runs)
    predicted = predict_from(comparison, float(cell.n_params), tokens_of_cell, unique, n_resamples)
    if predicted.reasons:
        return NewForecast(cell, None, predicted.reasons, len(earlier))
    forecast = StoredForecast(
        family=cell.family,
        requested_n_params=n_params,
        n_params=cell.n_params,
        tokens=tokens,
        trained_tokens=cell.trained_tokens,
        loss_nats=float(predicted.loss[0]),
        low_nats=float(predicted.low[0]),
        high_nats=float(predicted.high[0]),
        level=CONFIDENCE,
        law=predicted.law,
        laws=dict(zip(predicted.laws, predicted.weights, strict=True)),
        n_runs=len(runs),
        runs_digest=study.digest,
        cell_state=cell.state,
        warnings=(*cell.notes, *predicted.warnings),
        made=datetime.now(UTC).isoformat(timespec="milliseconds"),
        lmu_dist=__version__,
        git_commit=git_commit,
    )
    stored = replace(forecast, run_id=save_forecast(store, experiment, forecast))
    return NewForecast(cell, stored, (), len(earlier))


def score_forecasts(study: Study, forecasts: Sequence[StoredForecast]) -> ForecastScores:
    """Compares forecasts, the first made first, with the runs that a report uses. Only the first one of a cell counts."""
    seen, scores = set[tuple[str, int, int]](), list[ForecastScore]()
    for forecast in forecasts:
        scores.append(_score(study, forecast, _cell_key(forecast) not in seen))
        seen.add(_cell_key(forecast))
    return ForecastScores(tuple(scores))


def _score(study: Study, forecast: StoredForecast, counts: bool) -> ForecastScore:
    runs = runs_of_cell(study.runs, forecast.family, forecast.requested_n_params, forecast.n_params, forecast.tokens)
    if any(run.ended_ms <= forecast.made_ms for run in runs):
        return ForecastScore(forecast, counts, NOT_SCORED, "a run of the cell had ended before the forecast was made")
    remarks = [] if counts else ["a repeated forecast: the first one of the cell counts"]
    if not runs:
        return ForecastScore(forecast, counts, *_state_without_run(study, forecast))
    run = min(runs, key=lambda run: (run.ended_ms, run.record.seed))
    if len(runs) > 1:
        remarks.append(f"compared with the first of {len(runs)} seeds to end")
    actual = run.record.val_loss_nats
    return ForecastScore(
        forecast=forecast,
        counts=counts,
        state=SCORED,
        remark="; ".join(remarks),
        run_id=run.run_id,
        actual_nats=actual,
        error=forecast.loss_nats / actual - 1,
        inside=forecast.low_nats <= actual <= forecast.high_nats,
    )


def _state_without_run(study: Study, forecast: StoredForecast) -> tuple[str, str]:
    """Returns the state and the remark of a forecast whose cell has no run that a report uses."""
    for out in study.left_out:
        r = out.record
        if (
            r is not None
            and r.family == forecast.family
            and abs(r.n_params / forecast.n_params - 1) <= SAME_SIZE
            and is_budget(forecast.tokens, r.planned_tokens, r.batch_tokens)
        ):
            return NOT_SCORED, f"its run was left out: {out.reason}"
    return WAITING, "the cell has not ended"


def _cell_key(forecast: StoredForecast) -> tuple[str, int, int]:
    return forecast.family, forecast.requested_n_params, forecast.tokens
