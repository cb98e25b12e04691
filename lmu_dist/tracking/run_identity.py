"""How a process without MLflow names the MLflow run of a cell."""

from dataclasses import dataclass
from typing import NamedTuple

from lmu_dist.config import Folder


@dataclass(frozen=True)
class RunIdentity:
    """What is known of a cell's MLflow run before MLflow has it: enough to find it by its key, or to create it."""

    experiment: str
    study: str
    name: str
    key: str
    folder: str
    owner_id: str  # of the drivers that share file locks with this one


class LoggedRun(NamedTuple):
    """A run to log. `last_steps`: the last step of each metric in MLflow, where this machine lacks the metrics log."""

    folder: Folder
    run_id: str | None  # None: the uploader finds or creates the run of this identity
    identity: RunIdentity
    last_steps: dict[str, int]
