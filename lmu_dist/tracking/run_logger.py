"""The interface through which a run is logged: params, metrics, tags and tables in. Called by launch/record and worker."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class RunLogger(Protocol):
    """Logs one run. Implemented by MetricsLog, which writes a file, and by RemoteRunLogger, which calls the actor that does."""

    def start_run(self) -> None:
        """Sets the status of the MLflow run to RUNNING."""

    def start_attempt(self, attempt_id: str, tags: Mapping[str, Any]) -> None:
        """Counts a start of the run's workers in the tag `lmu.attempt`, once per id, and sets further tags."""

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Logs constants of the run."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metric values of a step. A value already logged for its key and step is dropped."""

    def log_curve(self, name: str, values: Sequence[float]) -> None:
        """Logs the values of a metric at the steps 1, 2, and so on."""

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags. The last value of a tag replaces the ones before."""

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Logs the dataset the run trains on."""

    def log_table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Logs a table as two artifacts: name.json, in MLflow's format, and name.csv."""

    def end_run(self, status: str) -> None:
        """Ends the MLflow run with a status of `lmu_dist.records`."""
