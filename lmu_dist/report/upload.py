"""Uploads a written report to MLflow: its files and results in, a run of the experiment out. Called by report/write."""

from collections.abc import Sequence
from pathlib import Path

from lmu_dist import __version__
from lmu_dist.config import FailedError
from lmu_dist.report.forecasts import ForecastScores
from lmu_dist.scaling.collect import Study
from lmu_dist.scaling.pair import Pair
from lmu_dist.scaling.results import Results
from lmu_dist.tracking.errors import MLflowUnavailableError
from lmu_dist.tracking.reports import save_report
from lmu_dist.tracking.store import Store


def upload_report(
    store: Store, folder: Path, names: Sequence[str], study: Study, results: Results, forecasts: ForecastScores, any_code: bool
) -> tuple[str, tuple[str, ...]]:
    """Uploads the named files of a folder. Returns the report's run id and the ids of earlier reports that are stale now.

    Raises FailedError if MLflow does not take them.
    """
    answer, pair = f"{results.answer.verdict}. {results.answer.sentence}", results.pair
    files, metrics = [folder / name for name in names], _metrics(results, forecasts)
    try:
        run_id, stale = save_report(
            store, study.experiment, study.digest, any_code, pair.name, files, _params(study, pair), metrics, answer
        )
    except MLflowUnavailableError as e:
        raise FailedError(f"the report was written to {folder}, but not uploaded: {e}") from e
    return run_id, tuple(stale)


def _params(study: Study, pair: Pair) -> dict[str, str]:
    return {
        "baseline": pair.base,
        "family": pair.new,
        "data_digest": study.runs[0].record.data_digest,
        "versions": study.versions,
        "lmu_dist": __version__,
        "n_runs": str(len(study.runs)),
        "n_left_out": str(len(study.left_out)),
    }


def _metrics(results: Results, forecasts: ForecastScores) -> dict[str, float]:
    """Returns the metrics of the report's MLflow run: parameters of determined laws, known factors, scores of forecasts."""
    found = dict[str, float]()
    if forecasts.share_inside is not None and forecasts.typical_error is not None:
        found |= {"forecast/scored": len(forecasts.counted), "forecast/share_inside": forecasts.share_inside}
        found["forecast/median_absolute_error"] = forecasts.typical_error
    for fit in results.fits:
        if law := fit.result.law:
            found |= {f"fit/{fit.family}/{name}": value for name, value in vars(law).items()}
    for comparison in results.all_comparisons:
        for size in comparison.sizes:
            for source, factor in (("curves", size.curves), ("laws", size.laws)):
                key = f"efficiency_factor/{comparison.new}_over_{comparison.base}/{source}"
                ends = zip(("", "_low", "_high"), (factor.value, *(factor.interval or (None, None))), strict=True)
                found |= {f"{key}/{size.n_params}{end}": value for end, value in ends if value is not None}
    return found
