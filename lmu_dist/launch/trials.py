"""Runs Ray Tune trials that start Ray Train runs with different numbers of workers. Used by ladder and tune.

A trial is only a driver; Ray Train places its workers. So a trial asks for a tiny share of a resource that every head node has,
and the number of concurrent trials is limited here by slots, one for each worker.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import ActorID, PlacementGroupID, tune
from ray._private.state import state as cluster_state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError
from ray.tune import TuneError
from ray.tune.search import Searcher
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from lmu_dist import background
from lmu_dist.config import FailedError
from lmu_dist.tracking.errors import one_line

HEAD = "node:__internal_head__"
RELEASE_SECONDS = 60.0  # how long Ray may take to release the resources of a stopped trial
TABLE_ERRORS = (RayError, RuntimeError, OSError)  # of a table that cannot be read, since the cluster does not answer
TICK_SECONDS = 2.0  # between two calls of TrialCallback's on_tick
REAP_SECONDS = 1.0  # between two searches for leaked placement groups, which hold the slots of stopped trials meanwhile


class Slots(Searcher):
    """A Tune search algorithm whose trials are groups of workers: a new one when a work item fits into the free slots."""

    def __init__(self, reserve: Callable[[str, int], int | None], n_slots: int) -> None:
        """`reserve`: that of a work list, see launch/work_queue."""
        super().__init__(metric=None, mode=None)
        self._reserve, self._n_slots, self._free_slots = reserve, n_slots, n_slots
        self._slots_of_trial = dict[str, int]()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """Required by Searcher; there is nothing to set."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """A group for the first work item that fits into the free slots; None while none fits."""
        if not (n_workers := self._reserve(trial_id, self._free_slots)):
            return None if n_workers == 0 else Searcher.FINISHED
        self._slots_of_trial[trial_id] = min(n_workers, self._n_slots)  # fewer with cluster.min_workers
        self._free_slots -= self._slots_of_trial[trial_id]
        return {"group": trial_id, "n_workers": n_workers}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Frees the slots of a trial, whether it succeeded or not."""
        self._free_slots += self._slots_of_trial.pop(trial_id, 0)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles nothing: Tune pickles its search algorithm into a snapshot, which is not used."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing: a ladder that starts again reads which cells have ended."""

    def restore(self, checkpoint_path: str) -> None:
        """Restores nothing."""


def head_node_id() -> str:
    """The id of the node on which trials run."""
    return next(node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"])


def run_trials(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    scratch: Path,
    tune_config: tune.TuneConfig,
    param_space: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
) -> list[Any]:
    """Runs trials and returns their results. A trial that raises does not stop the others. Raises FailedError if the cluster is
    lost.
    """
    # The caller handles Ctrl-C, because it has runs to close. Tune's logs and snapshots are not used.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # It logs a traceback if a snapshot cannot be written, for example on a full disk; the trials have their own message.
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
    name = f"{time.time_ns():x}"
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(function, **arguments), tune.PlacementGroupFactory([{HEAD: 0.001}])),
        param_space=param_space or {},
        tune_config=tune_config,
        run_config=tune.RunConfig(name=name, storage_path=str(scratch), verbose=0, callbacks=list(callbacks)),
    )
    try:
        with background.repeated(_remove_leaked_groups, REAP_SECONDS):
            return list(tuner.fit())  # pyright: ignore[reportArgumentType]
    except (RayError, TuneError, ConnectionError) as e:
        raise FailedError(f"the cluster was lost: {one_line(e)}") from e
    finally:
        shutil.rmtree(scratch / name, ignore_errors=True)


def wait_for_release() -> tuple[str, ...]:
    """Waits until the resources of all trials are released. Returns a warning if they are not after RELEASE_SECONDS."""
    deadline = time.monotonic() + RELEASE_SECONDS
    try:
        while groups := _placement_groups():
            if time.monotonic() > deadline:
                ids = ", ".join(group.placement_group_id.hex() for group in groups)
                return (f"Ray still holds {len(groups)} placement groups of trials that ended: {ids}",)
            _remove_leaked_groups()
            time.sleep(0.5)
    except TABLE_ERRORS as e:
        return (f"whether Ray has released all resources is unknown, since the cluster does not answer: {one_line(e)}",)
    return ()


def driver_environment() -> dict[str, str]:
    """The environment variables that trials need from this process: credentials and network settings."""
    return {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "AWS_", "NCCL_", "GLOO_", "TORCH_EXTENSIONS_DIR"))}


class TrialCallback(tune.Callback):
    """A Tune callback that calls on_start with a trial, on_end with a trial and whether it died, and on_tick regularly."""

    def __init__(
        self,
        on_start: Callable[[Any], None] = lambda _: None,
        on_end: Callable[[Any, bool], None] = lambda *_: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_start, self._on_end, self._on_tick, self._last_tick = on_start, on_end, on_tick, 0.0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune."""
        self._on_start(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune, also for a trial that a scheduler stopped."""
        self._on_end(trial, False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when the trial's process died or its function raised."""
        self._on_end(trial, True)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune several times a second."""
        if time.monotonic() - self._last_tick > TICK_SECONDS:
            self._on_tick()
            self._last_tick = time.monotonic()

    def __reduce__(self) -> Any:
        """Pickles as an empty callback: Tune pickles its callbacks into a snapshot, which is not used."""
        return tune.Callback, ()


def error_message(result: Any) -> str:
    """One line: why a trial failed; "" if it succeeded."""
    reported = (result.metrics or {}).get("error")
    lines = [line.strip() for line in str(result.error or "").splitlines() if line.strip()]
    return str(reported) if reported else lines[-1][:300] if lines else ""


def _remove_leaked_groups() -> None:
    """Removes the placement groups of trials that have died, such as those that a scheduler stopped.

    Does nothing while the cluster does not answer: the next call may succeed.

    Ray keeps them until the driver ends. Ray Train's cleaner of these groups is one more process for each trial, and needs the
    dashboard.
    """
    no_actor = ActorID.nil().binary()  # Tune's own groups were created by the driver
    with suppress(*TABLE_ERRORS):
        for group in _placement_groups():
            if group.creator_actor_dead and group.creator_actor_id != no_actor:
                remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def _placement_groups() -> list[Any]:
    """This driver's placement groups that have not been removed. Raises one of TABLE_ERRORS if the cluster does not answer.

    Read from Ray's control service: the public table has no creators, and Ray's State API needs the dashboard, which is eleven
    processes more on one machine.
    """
    job_id = bytes.fromhex(ray.get_runtime_context().get_job_id())
    rows = cluster_state._connect_and_get_accessor().get_placement_group_table()
    groups = [PlacementGroupTableData.FromString(row) for row in rows]
    return [g for g in groups if g.creator_job_id == job_id and g.state != PlacementGroupTableData.REMOVED]
