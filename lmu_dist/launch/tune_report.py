"""Forwards the evaluations of a run to Ray Tune: a callback of Ray Train, which its controller imports, so without torch."""

from typing import Any

from ray.tune.integration.ray_train import TuneReportCallback

LOSS, TOKENS = "val_loss_nats", "tokens"  # names in the reports


class ReportEvaluations(TuneReportCallback):
    """Forwards the workers' reports of evaluations, and no other reports, to Tune."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train for every report of the workers."""
        if metrics and LOSS in metrics[0]:
            super().after_report(run_context, metrics, None)
