"""Writes runs back into MLflow that a table of records has: a StoredRun in, a run of a cell out. For report/restore.

Such a run has the params, tags, final metrics and times that it had in the store that was lost. Of its curves it has the last
points only, and it has no folder. Its owner id is the table, which no driver has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlflow.entities import Metric, Param, Run, RunTag

from lmu_dist import records
from lmu_dist.records import RunRecord
from lmu_dist.tracking.runs import KnownRuns
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.stored_runs import APPEARANCE, GIT_COMMIT, N_WORKERS, StoredRun
from lmu_dist.tracking.studies import cells_of
from lmu_dist.tracking.tags import FORECAST, KEY, OWNER_ID, PARENT, RESTORED_FROM, RESTORED_RUN, RETIRED_KEY, RUN_NAME
from lmu_dist.tracking.upload import MAX_METRICS, MAX_PARAMS, MLFLOW_STATUS


@dataclass(frozen=True)
class KnownCells:
    """What a store has of cells before something is restored: their runs by key, and the ids of all runs.

    `ids` has those of retired runs too, and those that restored runs had in the store that was lost.
    """

    by_key: dict[str, Run] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)


def find_known_cells(store: Store) -> KnownCells:
    """Returns what a store has, after deleting runs that an interrupted `restore` has left incomplete."""
    with store.one_line_errors():
        if not (experiments := store.experiment_ids()):
            return KnownCells()
        cells = store.search_cells(experiments)
        retired = store.search_runs(experiments, f"tags.`{RETIRED_KEY}` LIKE '%'")
        restored = store.search_runs(experiments, f"tags.`{RESTORED_RUN}` LIKE '%'")
        for run in restored:
            if not run.data.tags.keys() & {KEY, RETIRED_KEY, FORECAST}:
                store.client.delete_run(run.info.run_id)
    ids = {run.info.run_id for run in (*cells, *retired)}
    ids |= {run.data.tags[RESTORED_RUN] for run in (*cells, *retired) if RESTORED_RUN in run.data.tags}
    by_start = sorted(cells, key=lambda run: run.info.start_time, reverse=True)  # of two with one key the first created counts
    return KnownCells({run.data.tags[KEY]: run for run in by_start}, ids)


def restore_run(
    store: Store, experiment_id: str, study_id: str, run: StoredRun, position_losses: Sequence[float], source: str
) -> Run:
    """Writes a run that has a result, under its study. `source` names its table. Raises MLflowUnavailableError.

    The tag with its key comes last: without it nothing finds a run of which a part is missing, but `find_known_cells`.
    """
    record = run.record
    assert record is not None
    time_ms = run.ended_ms or run.started_ms
    params = {**record.columns("params"), **run.params}
    known = {APPEARANCE: run.appearance, N_WORKERS: run.n_workers, GIT_COMMIT: run.git_commit}
    tags = record.columns("tags") | {name: text for name, text in known.items() if text}
    del tags[KEY]
    first_tags = {PARENT: study_id, RUN_NAME: run.name, OWNER_ID: source, **restored_tags(run.run_id, source)}
    metrics = _metrics(record, position_losses, time_ms)
    entries = [Param(name, str(value)) for name, value in params.items()]
    with store.one_line_errors():
        client = store.client
        run_id = client.create_run(experiment_id, start_time=run.started_ms, tags=first_tags).info.run_id
        client.log_batch(run_id, metrics[:MAX_METRICS], entries[:MAX_PARAMS], [RunTag(k, str(v)) for k, v in tags.items()])
        for i in range(MAX_METRICS, len(metrics), MAX_METRICS):
            client.log_batch(run_id, metrics[i : i + MAX_METRICS])
        for i in range(MAX_PARAMS, len(entries), MAX_PARAMS):
            client.log_batch(run_id, params=entries[i : i + MAX_PARAMS])
        status = MLFLOW_STATUS.get(record.status, "KILLED")
        if run.ended_ms:
            client.set_terminated(run_id, status, run.ended_ms)
        else:
            client.update_run(run_id, status)
        client.set_tag(run_id, KEY, record.key)
        return client.get_run(run_id)


def restored_tags(run_id: str, source: str) -> dict[str, str]:
    """Returns the tags that say from where a run was restored, and which id it had."""
    return {RESTORED_FROM: source, RESTORED_RUN: run_id}


def is_running_nothing(store: Store, experiment: str, study_id: str, known: KnownRuns) -> bool:
    """Whether a study has the status RUNNING, although all its runs were restored and all its planned cells have a run.

    `known`: the runs of the experiment.
    """
    with store.one_line_errors():
        status = store.client.get_run(study_id).info.status
    if status != "RUNNING":
        return False
    own, _, waiting = cells_of(store, experiment, study_id, known)
    return not waiting and all(RESTORED_FROM in run.data.tags for run in own)


def _metrics(record: RunRecord, position_losses: Sequence[float], time_ms: int) -> list[Metric]:
    """Returns the final metrics, the last points of the curves that `lmu-dist status` reads, and the losses by position."""
    last_points: dict[str, float] = {records.TRAIN_LOSS: record.train_loss_nats, records.TRAIN_TOKENS: record.tokens}
    if record.status == records.COMPLETE:  # else the last validation was perhaps earlier
        last_points |= {
            records.VAL_LOSS: record.val_loss_nats,
            records.VAL_ERROR: record.val_loss_standard_error_nats,
            records.BITS_PER_BYTE: record.val_bits_per_byte,
        }
    points = [(name, value, record.steps) for name, value in record.columns("metrics").items()]
    points += [(name, value, max(0, record.steps - 1)) for name, value in last_points.items()]
    points += [(records.POSITION_LOSS, loss, position) for position, loss in enumerate(position_losses, 1)]
    # MLflow turns infinity into the largest finite number, which would read as a loss.
    return [Metric(name, float(v) if math.isfinite(v) else math.nan, time_ms, step) for name, v, step in points]
