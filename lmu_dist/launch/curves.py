"""The training curves of a run: StepMetrics of every step in, points of the steps that are logged out. Called by worker."""

from collections.abc import Callable
from dataclasses import replace

from lmu_dist.config import TrainConfig
from lmu_dist.records import StepMetrics


class TrainingCurves:
    """Logs the steps that `TrainConfig.is_logged` names.

    Loss, gradient norm and learning rate are those of the step itself, not means: so a thinned curve has the noise of the run,
    and a run that resumes has the same points bit for bit. Speeds are those of all steps since the point before.
    """

    def __init__(
        self,
        log_metrics: Callable[[int, dict[str, float]], object],
        train: TrainConfig,
        fork_step: int,
        flops_per_token: float,
        peak_flops_per_second: float,
    ) -> None:
        """`log_metrics` takes a step and its metrics. `fork_step`: the first step of a run that branched off, else 0."""
        self._log_metrics, self._train, self._fork_step = log_metrics, train, fork_step
        self._flops_per_token, self._peak = flops_per_token, peak_flops_per_second
        self._seconds = list[float]()  # of each step since the last point
        self._last: StepMetrics | None = None

    def add(self, metrics: StepMetrics) -> None:
        """Takes the metrics of the next step, and logs them if the curves have a point there."""
        self._seconds.append(metrics.step_seconds)
        self._last = metrics
        if self._train.is_logged(metrics.step, self._fork_step):
            self.log_last()

    def log_last(self) -> None:
        """Logs the last step if it is not logged yet. Called where a run diverges, since its curves end there."""
        if self._last is None or not self._seconds:
            return
        mean = replace(self._last, step_seconds=sum(self._seconds) / len(self._seconds))
        self._seconds.clear()
        self._log_metrics(mean.step, mean.values(self._train.batch_tokens, self._flops_per_token, self._peak))
