"""Ray Tune trials that are Ray Train runs of different sizes: works and slots in, results out. Used by ladder and tune.

A trial is only a small driver; its workers are placed by Ray Train. So trials ask for a trace of a resource that every head
node has, and what keeps them from overbooking the cluster is counted here, in slots: one for every worker.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID, tune
from ray.exceptions import RayError
from ray.tune import TuneError
from ray.tune.search import Searcher
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.state import list_actors, list_placement_groups
from ray.util.state.exception import RayStateApiException

from lmu_dist.config import ConfigError, FailedError
from lmu_dist.tracking.store import one_line

HEAD = "node:__internal_head__"
RELEASE_SECONDS = 60.0  # how long Ray may take to give back what a stopped trial had reserved
STATE_ERRORS = (RayStateApiException, RayError, RuntimeError, OSError)
TICK_SECONDS = 2.0
LOOK_SECONDS = 10.0  # between two looks for what nobody gave back


class Slots(Searcher):
    """Hands out works by their index, in order, each once as many slots are free as it has workers; what fits goes first."""

    def __init__(self, n_workers: Sequence[int], n_slots: int) -> None:
        super().__init__(metric=None, mode=None)
        assert max(n_workers) <= n_slots
        self._sizes, self._free = list(n_workers), n_slots
        self._waiting, self._held = list(range(len(n_workers))), dict[str, int]()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """Takes note of nothing: the works are what they are."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The first work that fits; None while none does."""
        if not self._waiting:
            return Searcher.FINISHED
        for index in self._waiting:
            if self._sizes[index] <= self._free:
                self._waiting.remove(index)
                self._held[trial_id] = self._sizes[index]
                self._free -= self._sizes[index]
                return {"index": index}
        return None

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Gives the slots back, however the trial ended."""
        self._free += self._held.pop(trial_id, 0)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: a ladder that starts again looks at what is done."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""


def check_state_api() -> None:
    """Raises ConfigError if the cluster's State API is silent: without it Ray never frees what a stopped trial reserved."""
    try:
        _held()
    except STATE_ERRORS as e:
        raise ConfigError(
            "the cluster's State API does not answer, without which stopped trials would keep their workers' places; "
            f"start the head with its dashboard (ray[default]): {one_line(e)}"
        ) from e


def run_trials(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    scratch: Path,
    tune_config: tune.TuneConfig,
    param_space: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
) -> list[Any]:
    """Runs trials to their end and returns their results; one that raises does not end the others. Raises FailedError if the
    cluster goes away.
    """
    # Ctrl-C is for the caller, who has records to close; nothing reads Tune's own logs and snapshots.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    name = f"{time.time_ns():x}"
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(function, **arguments), tune.PlacementGroupFactory([{HEAD: 0.001}])),
        param_space=param_space or {},
        tune_config=tune_config,
        run_config=tune.RunConfig(name=name, storage_path=str(scratch), verbose=0, callbacks=list(callbacks)),
    )
    try:
        with _Reaper().watching():
            return list(tuner.fit())  # pyright: ignore[reportArgumentType]
    except (RayError, TuneError, ConnectionError) as e:
        raise FailedError(f"the cluster was lost: {one_line(e)}") from e
    finally:
        shutil.rmtree(scratch / name, ignore_errors=True)


def still_reserved() -> tuple[str, ...]:
    """What a person should know of the cluster after the trials: what, by the State API, nobody has given back in a minute."""
    reaper, deadline = _Reaper(), time.monotonic() + RELEASE_SECONDS
    try:
        while held := _held():
            if time.monotonic() > deadline:
                return (f"Ray still holds {len(held)} placement groups of trials that ended: {', '.join(held)}",)
            reaper.look()
            time.sleep(2)
    except STATE_ERRORS as e:
        return (f"whether all places were given back is not known, the State API does not answer: {one_line(e)}",)
    return ()


def driver_environment() -> dict[str, str]:
    """Credentials and network settings of this process, which trials, on a cluster that was there before, do not have."""
    return {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "AWS_", "NCCL_", "GLOO_", "TORCH_EXTENSIONS_DIR"))}


class Watcher(tune.Callback):
    """Hears of trials from Tune: that one has begun, that it has ended and whether it died of it, and every two seconds."""

    def __init__(self, begun: Callable[[Any], None], ended: Callable[[Any, bool], None], tick: Callable[[], None]) -> None:
        self._begun, self._ended, self._tick, self._ticked = begun, ended, tick, 0.0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Of Tune's callbacks."""
        self._begun(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Of Tune's callbacks; called for a trial that a scheduler stopped, too."""
        self._ended(trial, False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Of Tune's callbacks; called when the trial's process died or raised."""
        self._ended(trial, True)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Of Tune's callbacks; called some times a second."""
        if time.monotonic() - self._ticked > TICK_SECONDS:
            self._tick()
            self._ticked = time.monotonic()

    def __reduce__(self) -> Any:
        """Tune pickles its callbacks into a snapshot that nobody reads."""
        return tune.Callback, ()


def why(result: Any) -> str:
    """One line: why a trial came to no good; "" if it did."""
    said = (result.metrics or {}).get("error")
    lines = [line.strip() for line in str(result.error or "").splitlines() if line.strip()]
    return str(said) if said else lines[-1][:300] if lines else ""


class _Reaper:
    """Gives back what the workers of a stopped trial had reserved.

    Ray's own cleaner does so while it can tell its cluster from others on the machine, and dies where it cannot.
    """

    def __init__(self) -> None:
        self._suspects: set[str] = set()

    def look(self) -> None:
        """Removes placement groups that had no living actor at this look nor at the one before."""
        options: Any = {"address": ray.get_runtime_context().gcs_address, "limit": 10_000, "timeout": 30, "detail": True}
        actors: Any = list_actors(filters=[("state", "!=", "DEAD")], raise_on_missing_output=False, **options)
        empty = set(_held()) - {actor.placement_group_id for actor in actors}
        for group in empty & self._suspects:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
        self._suspects = empty

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Looks every ten seconds, from a thread of its own."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(LOOK_SECONDS):
                with suppress(*STATE_ERRORS):  # the next look may succeed
                    self.look()

        thread = threading.Thread(target=watch, name="reaper", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _held() -> list[str]:
    """Ids of this driver's placement groups that hold something."""
    context = ray.get_runtime_context()
    # Of this cluster, by its address: there may be others on the machine.
    groups: Any = list_placement_groups(address=context.gcs_address, limit=10_000, timeout=30, raise_on_missing_output=False)
    return [g.placement_group_id for g in groups if g.creator_job_id == context.get_job_id() and g.state == "CREATED"]
