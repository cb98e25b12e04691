"""The runs of an experiment as they are stored, before anything decides which of them a fit may use: a store in, rows out.

scaling/collect makes a `Study` of them. scaling/run_csv writes them to a table of records and reads them back, so that a report
needs no MLflow store.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow.entities import Run

from lmu_dist.records import RunRecord
from lmu_dist.tracking.runs import record_of
from lmu_dist.tracking.store import Store
from lmu_dist.tracking.studies import cells_of, planned_baseline
from lmu_dist.tracking.tags import RUN_NAME, STATUS

APPEARANCE, GIT_COMMIT, N_WORKERS = "lmu.family_appearance", "lmu.git_commit", "lmu.n_workers"  # tags of runs
SOURCE = "data.source"


@dataclass(frozen=True)
class StoredRun:
    """A run of a cell, with or without a result.

    `params` has the keys of `model` and `train` in its configuration, and `data.source`, as text. `appearance` is how reports
    show its family, as JSON; "" if it is not known. Times are milliseconds since 1970, 0 if they are not known.
    `experiment` is the one that it was read for, which counts a cell of its plan as its own also if another one trained it.
    """

    run_id: str
    name: str
    status: str
    record: RunRecord | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    appearance: str = ""
    started_ms: int = 0
    ended_ms: int = 0
    n_workers: str = ""
    git_commit: str = ""
    experiment: str = ""


@dataclass(frozen=True)
class StoredRuns:
    """The runs of an experiment, the names of planned cells that have no run, and the family that its ladders compare with.

    Tables of several experiments are read as one, whose name lists theirs. `planned_in` then has the experiment of each planned
    cell.
    """

    experiment: str
    runs: tuple[StoredRun, ...]
    not_started: tuple[str, ...] = ()
    baseline: str | None = None
    planned_in: Mapping[str, str] = field(default_factory=dict)


def read_runs(store: Store, experiment: str) -> StoredRuns:
    """Returns the runs of an experiment, including cells of its plan that another experiment had already trained.

    Raises ConfigError if the experiment does not exist.
    """
    own, elsewhere, waiting = cells_of(store, experiment)
    runs = tuple(_stored(run, experiment) for run in [*own, *elsewhere.values()])
    return StoredRuns(experiment, runs, tuple(cell["name"] for cell in waiting), planned_baseline(store, experiment))


def _stored(run: Run, experiment: str) -> StoredRun:
    params, tags = run.data.params, run.data.tags
    return StoredRun(
        run_id=run.info.run_id,
        name=tags.get(RUN_NAME, ""),
        status=tags.get(STATUS, "unknown"),
        record=record_of(run),
        params={k: v for k, v in params.items() if v and (k == SOURCE or k.startswith(("model.", "train.")))},
        appearance=tags.get(APPEARANCE, ""),
        started_ms=run.info.start_time or 0,
        ended_ms=run.info.end_time or 0,
        n_workers=tags.get(N_WORKERS, ""),
        git_commit=tags.get(GIT_COMMIT, ""),
        experiment=experiment,
    )
