"""Which driver owns an MLflow run, and whether it lives: a run in, its owner id out. Called by launch, new_run and upload."""

import time
from typing import TYPE_CHECKING

from lmu_dist.tracking.tags import FOLDER, OWNER_ID

if TYPE_CHECKING:  # processes that need no MLflow import this module
    from mlflow.entities import Run

HEARTBEAT_TIMEOUT_SECONDS = 90.0  # without a heartbeat, after which a run counts as abandoned


def owner_id_of(run: "Run") -> str | None:
    """The owner id of a run; in runs of earlier versions its folder."""
    return run.data.tags.get(OWNER_ID, run.data.tags.get(FOLDER))


def heartbeat_now() -> str:
    """The value of a heartbeat: milliseconds since 1970."""
    return str(int(time.time() * 1000))
