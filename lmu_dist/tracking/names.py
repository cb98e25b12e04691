"""Resolves what people call a run: its name, its key or the start of a key, or its id in; its folder out. For cli/results."""

import re

from mlflow.entities import Run

from lmu_dist.config import ConfigError, Folder, open_folder
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.tags import FOLDER, KEY, RESTORED_FROM, RETIRED_KEY, RUN_NAME


def folder_of(store: Store, reference: str) -> Folder:
    """The folder of a run, with its checkpoints, by what tables print of the run: its name, its key or the start of it, or
    its id in MLflow. Raises ConfigError if there is no such run, if there are several, or if the folder does not exist.
    """
    found = _runs_called(store, reference)
    if not found:
        raise ConfigError(
            f"there is no folder {reference!r}, and no run with this name, key or id in {store.uri}; `lmu-dist status "
            "EXPERIMENT` prints the names"
        )
    if len(found) > 1:
        some = ", ".join(f"{run.data.tags[RUN_NAME]} ({run.info.run_id})" for run in found[:5])
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise ConfigError(f"{reference!r} names {len(found)} runs or starts their keys; give one of: {some}{more}")
    tags = found[0].data.tags
    if FOLDER not in tags:
        raise ConfigError(
            f"{reference} was restored from {tags[RESTORED_FROM]}, which has its result but no checkpoint; to have its model, "
            f"train it again: `lmu-dist ladder CONFIG --rerun {tags.get(KEY, reference)[:12]}`"
        )
    folder = tags[FOLDER]
    if not open_folder(folder).is_dir():
        raise ConfigError(f"the folder of {reference}, {folder}, is not on this machine; give the path that it has here")
    return open_folder(folder)


def _runs_called(store: Store, reference: str) -> list[Run]:
    """The runs of cells with this id, name or start of a key: those that fit best, in this order. One for each key."""
    if not re.fullmatch(r"[\w.-]+", reference):
        return []  # of no run, and not to be quoted in a query
    with store.one_line_errors():
        if not (experiments := store.experiment_ids()):
            return []
        for query in (
            f"attributes.run_id = '{reference}'",
            f"tags.`{RUN_NAME}` = '{reference}' AND tags.`{KEY}` LIKE '%'",
            f"tags.`{KEY}` LIKE '{reference}%'" if re.fullmatch("[0-9a-f]{4,64}", reference) else "",
            f"tags.`{RUN_NAME}` = '{reference}'",  # of a run that was trained again since
        ):
            runs = [run for run in (store.search_runs(experiments, query) if query else []) if _is_of_cell(run)]
            if runs:
                # The first created of several with one key, as `find_run` does.
                runs.sort(key=lambda run: run.info.start_time, reverse=True)
                return list({run.data.tags.get(KEY, run.info.run_id): run for run in runs}.values())
    return []


def _is_of_cell(run: Run) -> bool:
    """Whether a run trained a cell. A restored forecast did not, although its tags say from where it was restored."""
    tags = run.data.tags.keys()
    return FOLDER in tags or (RESTORED_FROM in tags and bool(tags & {KEY, RETIRED_KEY}))
