"""What is known of a cell's MLflow run before MLflow has it. Does not import MLflow: it goes to processes that need none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunIdentity:
    """What is known of a cell's MLflow run before MLflow has it: enough to find it by its key, or to create it."""

    experiment: str
    study: str
    name: str
    key: str
    folder: str
    owner_id: str  # of the drivers that share file locks with this one
