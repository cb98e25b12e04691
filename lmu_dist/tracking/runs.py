"""Finds and reads the runs of cells in MLflow: a key, an experiment or a run id in, runs, RunRecords or losses out.

Called by launch, scaling, report and studies. The run of a cell has the tag KEY; new_run makes it, and what is logged of it
goes through MetricsLog and MLflowUploader.
"""

from dataclasses import dataclass

from mlflow.entities import Run

from lmu_dist.records import POSITION_LOSS, VAL_LOSS, RunRecord
from lmu_dist.tracking.experiments import find_experiment
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.tags import KEY, RETIRED_KEY, STATUS


def find_run(store: Store, key: str) -> Run | None:
    """The run of a cell, in any experiment; None if there is none. Of two runs, the one created first."""
    return min(runs_with_key(store, key), key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def runs_with_key(store: Store, key: str) -> list[Run]:
    """All runs with the key of a cell. There are two only for a moment, when two drivers create the same run."""
    with store.one_line_errors():
        experiments = store.experiment_ids()
        return store.search_runs(experiments, f"tags.`{KEY}` = '{key}'") if experiments else []


def runs_of(store: Store, experiment: str) -> list[Run]:
    """The runs of all cells of an experiment. Raises ConfigError if there is no such experiment."""
    with store.one_line_errors():
        return store.search_cells([find_experiment(store, experiment).experiment_id])


def retired_runs_of(store: Store, experiment: str) -> list[Run]:
    """The runs of an experiment whose cells are trained again: they have no KEY any more. Raises ConfigError like `runs_of`."""
    with store.one_line_errors():
        return store.search_runs([find_experiment(store, experiment).experiment_id], f"tags.`{RETIRED_KEY}` LIKE '%'")


def records_of(store: Store, experiment: str) -> dict[str, RunRecord]:
    """The RunRecords of the runs of an experiment that have one, by run id."""
    found = {run.info.run_id: record_of(run) for run in runs_of(store, experiment)}
    return {run_id: record for run_id, record in found.items() if record is not None}


@dataclass(frozen=True)
class KnownRuns:
    """The runs of cells that MLflow had at one moment: those of an experiment, and some of other experiments."""

    own: list[Run]
    elsewhere: list[Run] | None = None  # None: not asked for

    def by_key(self) -> dict[str, Run]:
        """The runs by key; of two with one key, the first created."""
        found = [*self.own, *(self.elsewhere or ())]
        return {run.data.tags[KEY]: run for run in sorted(found, key=lambda run: run.info.start_time, reverse=True)}


def find_known_runs(store: Store, experiment: str, data_digest: str, train_version: int) -> KnownRuns:
    """All runs of cells of an experiment, and those of a corpus and a training version in other experiments.

    Each run is read once, since reading them is what takes time: a second or more for a thousand.
    """
    with store.one_line_errors():
        found = store.client.get_experiment_by_name(experiment)
        own_ids = [found.experiment_id] if found is not None and found.lifecycle_stage == "active" else []
        other_ids = [experiment_id for experiment_id in store.experiment_ids() if experiment_id not in own_ids]
        made_with = f"params.data_digest = '{data_digest}' AND params.train_version = '{train_version}'"
        return KnownRuns(
            store.search_cells(own_ids) if own_ids else [],
            store.search_cells(other_ids, made_with) if other_ids else [],
        )


def record_of(run: Run) -> RunRecord | None:
    """The RunRecord of a run; None if the run has not ended."""
    try:
        return RunRecord.from_columns(run.data.params, run.data.metrics, run.data.tags)
    except (KeyError, ValueError):
        return None


def validation_losses(store: Store, run_id: str, batch_tokens: int) -> list[tuple[int, float]]:
    """(tokens, loss in nats) of every validation of a run, in order."""
    with store.one_line_errors():
        points = {m.step: m.value for m in store.client.get_metric_history(run_id, VAL_LOSS)}
        return [((step + 1) * batch_tokens, loss) for step, loss in sorted(points.items())]


def position_losses(store: Store, run_id: str) -> list[float]:
    """Validation loss at position 1 .. n of a row, in nats; empty if the run has none in MLflow."""
    with store.one_line_errors():
        points = {m.step: m.value for m in store.client.get_metric_history(run_id, POSITION_LOSS)}
        return [loss for _, loss in sorted(points.items())]


def retire_run(store: Store, run_id: str) -> None:
    """Moves the key of a run to the tag lmu.retired_key, so that its cell can be trained again. The run stays in MLflow."""
    with store.one_line_errors():
        run = store.client.get_run(run_id)
        store.client.set_tag(run_id, RETIRED_KEY, run.data.tags[KEY])
        store.client.set_tag(run_id, STATUS, "retired")
        store.client.delete_tag(run_id, KEY)
