"""Finds, creates and describes experiments in MLflow: a name in, an id out. Called by studies, runs, reports and cli/ui."""

from collections.abc import Iterable

from mlflow.entities import Experiment, Run

from lmu_dist.config import ConfigError
from lmu_dist.tracking import pages
from lmu_dist.tracking.store import Store


def open_experiment(store: Store, experiment: str) -> str:
    """The id of an experiment, created if there is none. Raises ConfigError if it was deleted, and the errors of MLflow."""
    found = store.client.get_experiment_by_name(experiment)
    if found is not None and found.lifecycle_stage != "active":
        raise ConfigError(f"{_deleted(found)}, or choose another name")
    if found is not None:
        return found.experiment_id
    experiment_id = store.client.create_experiment(experiment, store.artifact_folder(experiment))
    set_experiment_tags(store, experiment_id, runs=())
    return experiment_id


def find_experiment(store: Store, experiment: str) -> Experiment:
    """An experiment by its name. Raises ConfigError if there is none or it was deleted, and the errors of MLflow."""
    found = store.client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in store.client.search_experiments(max_results=20))
        raise ConfigError(f"no experiment {experiment!r} in {store.uri}; it has: {names}")
    if found.lifecycle_stage != "active":
        raise ConfigError(_deleted(found))
    return found


def check_not_deleted(store: Store, experiment: str) -> None:
    """Raises ConfigError if an experiment was deleted, so that nothing can be written into it. It may not exist yet."""
    with store.one_line_errors():
        found = store.client.get_experiment_by_name(experiment)
    if found is not None and found.lifecycle_stage != "active":
        raise ConfigError(_deleted(found))


def _deleted(experiment: Experiment) -> str:
    restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
    return f"experiment {experiment.name!r} was deleted in MLflow; restore it, with its runs, by `{restore}`"


def set_experiment_tags(store: Store, experiment_id: str, answer: str = "", runs: Iterable[Run] | None = None) -> None:
    """Sets the description and the view of an experiment, but replaces no description that somebody else wrote.

    `runs`: the runs of its cells, if the caller has them.
    """
    existing = store.client.get_experiment(experiment_id).tags
    runs = store.search_cells([experiment_id]) if runs is None else runs
    families = {run.data.params.get("family", "") for run in runs}
    for key, value in pages.experiment_tags(experiment_id, families - {""}, answer).items():
        ours = pages.OURS in existing.get(key, "") and answer
        if key not in existing or (key == pages.VIEW_TAG and existing[key] != value) or (key == pages.NOTE and ours):
            store.client.set_experiment_tag(experiment_id, key, value)


def prepare_pages(store: Store, experiment: str) -> str:
    """Saves the view that the link to an experiment names. Returns the experiment's id. Raises ConfigError if there is none."""
    with store.one_line_errors():
        experiment_id = find_experiment(store, experiment).experiment_id
        set_experiment_tags(store, experiment_id)
        return experiment_id
