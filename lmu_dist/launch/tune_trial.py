"""A trial of a search: trains one cell, and reports each of its evaluations to Ray Tune.

A process of its own, which imports neither torch nor MLflow. Started by launch/tune, which gives it its cell through the queue.
"""

import os
import time
from typing import Any

import ray
from ray import tune as ray_tune

from lmu_dist import records, storage
from lmu_dist.config import ConfigError, FailedError
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.dispatcher import Services
from lmu_dist.launch.record import FinishedRun
from lmu_dist.launch.tune_report import LOSS, TOKENS, ReportEvaluations
from lmu_dist.launch.work_source import OneTrunk
from lmu_dist.launch.worker_group import train_run_groups
from lmu_dist.tracking.errors import BusyError, MLflowUnavailableError

DIVERGED_LOSS = 1e9  # nats; reported to Tune for a trial that diverged or failed


def train_trial(
    _sampled: dict[str, Any], services: Services, environment: dict[str, str], final_statuses: tuple[str, ...]
) -> dict[str, Any]:
    """The function of a trial. The evaluations of earlier starts of its cell are reported first, so that ASHA sees them."""
    os.environ.update(environment)
    trial = ray.get(services.queue.search_trial.remote(ray_tune.get_context().get_trial_id()))
    if trial.cell is None:
        return _failed(trial.error)
    for tokens, loss in trial.evaluations:
        ray_tune.report({TOKENS: tokens, LOSS: loss})
    try:
        record = _train_when_free(trial.cell, services, final_statuses).record
    except (ConfigError, FailedError, OSError) as e:
        return _failed(storage.error_text(e))
    return {TOKENS: record.tokens, LOSS: DIVERGED_LOSS if record.status == records.DIVERGED else record.val_loss_nats}


def _failed(error: str) -> dict[str, Any]:
    return {"error": error, TOKENS: 0, LOSS: DIVERGED_LOSS}


def _train_when_free(cell: Cell, services: Services, final_statuses: tuple[str, ...]) -> FinishedRun:
    """Trains a cell. Waits while another driver is training it or MLflow is unavailable."""
    while True:
        source, name = OneTrunk([cell]), f"tune-{cell.key[:12]}-{time.time_ns():x}"
        train_run_groups(source, name, cell.config, services, callbacks=[ReportEvaluations()], final_statuses=final_statuses)
        try:
            [finished] = source.result()
            return finished
        except (BusyError, MLflowUnavailableError):
            time.sleep(5)
