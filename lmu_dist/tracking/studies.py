"""Studies in MLflow: the name of an experiment and of a study in, its parent run and the cells that it plans out.

Called by launch, reports, progress and scaling/collect. A study is the parent run of the runs of its cells.
"""

import json
import time
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.entities import Metric, Run, RunTag

from lmu_dist.records import COMPLETE
from lmu_dist.tracking import pages
from lmu_dist.tracking.experiments import find_experiment, open_experiment, set_experiment_tags
from lmu_dist.tracking.runs import KnownRuns, runs_of
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.tags import ANSWER, BASELINE, KEY, PARENT, RUN_NAME, STATUS, STUDY

PLAN = "plan.json"  # artifact of a study


def open_study(store: Store, experiment: str, study: str) -> tuple[str, str]:
    """(experiment id, run id) of a study, created if there is none."""
    with store.one_line_errors():
        experiment_id = open_experiment(store, experiment)
        if (study_id := _find_study(store, experiment_id, study)) is None:
            study_id = store.client.create_run(experiment_id, tags={STUDY: study, RUN_NAME: study}).info.run_id
        return experiment_id, study_id


def _find_study(store: Store, experiment_id: str, study: str) -> str | None:
    runs = store.client.search_runs([experiment_id], f"tags.`{STUDY}` = '{study}'", max_results=1)
    return runs[0].info.run_id if runs else None


def start_study(store: Store, experiment: str, study: str) -> None:
    """Sets the status of the parent run of a study to RUNNING, after creating it if there is none."""
    _, study_id = open_study(store, experiment, study)
    with store.one_line_errors():
        store.client.update_run(study_id, status="RUNNING")


def write_plan(store: Store, experiment: str, study: str, cells: list[dict[str, Any]], baseline: str = "") -> None:
    """Saves the cells that a study plans to run as an artifact of the study, for `lmu-dist status`.

    `baseline`: the name of the family that the others are compared with, for reports.
    """
    start_study(store, experiment, study)
    _, study_id = open_study(store, experiment, study)
    with store.one_line_errors():
        store.client.log_dict(study_id, {"cells": cells}, PLAN)
        if baseline:
            store.client.set_tag(study_id, BASELINE, baseline)


def add_to_plan(store: Store, experiment: str, study_id: str, cells: list[dict[str, Any]]) -> None:
    """Adds cells to the plan of a study, those that it has not."""
    planned = read_plans(store, experiment, study_id)
    keys = {cell["key"] for cell in planned}
    if new := [cell for cell in cells if cell["key"] not in keys]:
        with store.one_line_errors():
            store.client.log_dict(study_id, {"cells": [*planned, *new]}, PLAN)


def set_baseline(store: Store, study_id: str, baseline: str) -> None:
    """Sets the family that a study compares the others with, unless the study has one."""
    with store.one_line_errors():
        if BASELINE not in store.client.get_run(study_id).data.tags:
            store.client.set_tag(study_id, BASELINE, baseline)


def planned_baseline(store: Store, experiment: str) -> str | None:
    """The family that the ladders of an experiment compare the others with; None if none says so, or two disagree."""
    with store.one_line_errors():
        found = store.client.get_experiment_by_name(experiment)
        studies = store.search_runs([found.experiment_id], f"tags.`{STUDY}` LIKE '%'") if found else []
        named = {study.data.tags[BASELINE] for study in studies if BASELINE in study.data.tags}
        return named.pop() if len(named) == 1 else None


def read_plans(store: Store, experiment: str, study_id: str | None = None) -> list[dict[str, Any]]:
    """The cells that the studies of an experiment, or one of them, plan to run."""
    with store.one_line_errors():
        found = store.client.get_experiment_by_name(experiment)
        studies = store.search_runs([found.experiment_id], f"tags.`{STUDY}` LIKE '%'") if found else []
        cells = list[dict[str, Any]]()
        for study in studies:
            if study_id in (None, study.info.run_id) and any(
                a.path == PLAN for a in store.client.list_artifacts(study.info.run_id)
            ):
                with TemporaryDirectory() as folder:
                    path = store.client.download_artifacts(study.info.run_id, PLAN, folder)
                    cells += json.loads(Path(path).read_text())["cells"]
        return cells


def cells_of(
    store: Store, experiment: str, study_id: str | None = None, known: KnownRuns | None = None
) -> tuple[list[Run], dict[str, Run], list[dict[str, Any]]]:
    """(runs of an experiment; runs of its planned cells in other experiments, by key; planned cells without a run).

    `study_id`: only the cells of this study, those that it started and those that it plans. `known`: the runs, if the caller
    has just read them.
    """
    own, plan = known.own if known else runs_of(store, experiment), read_plans(store, experiment, study_id)
    keys, planned_keys = {run.data.tags[KEY] for run in own}, {cell["key"] for cell in plan}
    missing = {cell["key"]: cell for cell in plan if cell["key"] not in keys}
    if study_id is not None:
        own = [run for run in own if run.data.tags.get(PARENT) == study_id or run.data.tags[KEY] in planned_keys]
    elsewhere = planned_elsewhere(store, experiment, missing, known.elsewhere if known else None)
    return own, elsewhere, [cell for key, cell in missing.items() if key not in elsewhere]


def planned_elsewhere(store: Store, experiment: str, keys: Collection[str], runs: list[Run] | None = None) -> dict[str, Run]:
    """The runs of cells with these keys in other experiments, by key. `runs`: those of other experiments, if they are known."""
    if not keys:
        return {}
    if runs is None:
        with store.one_line_errors():
            own_id = find_experiment(store, experiment).experiment_id
            other_ids = [experiment_id for experiment_id in store.experiment_ids() if experiment_id != own_id]
            runs = store.search_cells(other_ids) if other_ids else []
    # Of several runs with one key keep a complete one, else the first created: the last in this order replaces others.
    runs = sorted(runs, key=lambda run: (run.data.tags.get(STATUS) == COMPLETE, -run.info.start_time))
    return {run.data.tags[KEY]: run for run in runs if run.data.tags[KEY] in keys}


def end_study(store: Store, experiment: str, study: str, status: str = "FINISHED", known: KnownRuns | None = None) -> None:
    """Ends the parent run of a study with a status of MLflow, a table of its cells as description, and its numbers.

    Does nothing if there is no such study. Raises ConfigError if there is no such experiment. `known`: the runs of the cells,
    if the caller has just read them.
    """
    with store.one_line_errors():
        experiment_id = find_experiment(store, experiment).experiment_id
        study_id = _find_study(store, experiment_id, study)
    if study_id is None:
        return
    known = known or KnownRuns(runs_of(store, experiment))
    describe_study(store, experiment, study_id, known)
    with store.one_line_errors():
        set_experiment_tags(store, experiment_id, runs=known.own)
        store.client.set_terminated(study_id, status)


def describe_study(store: Store, experiment: str, study_id: str, known: KnownRuns | None = None) -> None:
    """Sets the description of a study, with a table of its cells, and its metrics. `known`: see `end_study`."""
    own, elsewhere, planned = cells_of(store, experiment, study_id, known)
    cells = [*own, *elsewhere.values()]
    with store.one_line_errors():
        run = store.client.get_run(study_id)
        tags = run.data.tags
        note, numbers = pages.describe_study(tags[STUDY], cells, len(planned), tags.get(ANSWER, ""))
        now = int(time.time() * 1000)
        changed = [Metric(k, v, now, 0) for k, v in numbers.items() if run.data.metrics.get(k) != v]
        store.client.log_batch(study_id, changed, tags=[RunTag(pages.NOTE, note)])
