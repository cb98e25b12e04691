"""Prints the answer of a report. Used by cli/."""

from typing import TYPE_CHECKING

from lmu_dist.config import Folder

if TYPE_CHECKING:  # these imports are slow, and only needed for annotations
    from lmu_dist.report.write import ReportFiles


def print_report(written: "ReportFiles", folder: Folder) -> None:
    """Prints the answer of a report, which laws are determined, and where the report is."""
    answer = written.results.answer
    print(f"answer       {answer.verdict}. {answer.sentence}")
    for sentence in filter(None, (answer.others, answer.growth)):
        print(f"             {sentence}")
    for caveat in answer.caveats:
        print(f"             {caveat}")
    for fitted in written.results.fits:
        diagnostics = fitted.result.diagnostics
        verdict = "determined" if diagnostics.passed else f"not determined: {'; '.join(diagnostics.reasons)}"
        print(f"law          {fitted.family}: {verdict}")
        if supported := [law.name for law in fitted.comparison.supported if fitted.comparison.fits]:
            print(f"             laws that its runs support: {', '.join(supported)}")
    forecasts = written.forecasts
    if forecasts.scores:
        inside = (
            f"; {forecasts.n_inside} of {len(forecasts.counted)} losses inside of their intervals" if forecasts.counted else ""
        )
        print(f"forecasts    {len(forecasts.scores):,}, {len(forecasts.counted):,} scored{inside}")
    print(f"runs         {len(written.study.runs):,} used, {len(written.study.left_out):,} left out")
    for reason, count in written.study.left_out_counts().items():
        print(f"left out     {count:,} {reason}")
    for run_id in written.stale:
        print(f"stale now    report {run_id}, which was made from other runs")
    in_mlflow = f"; MLflow run {written.run_id}" if written.run_id else ""
    print(f"report       {folder / 'report.html'}{in_mlflow}")
