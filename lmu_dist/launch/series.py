"""A series: cells of one trunk, run one after the other by one group of Ray Train workers. Cells in, records out.

Called by trainer (a series of one), and inside a Ray Tune trial by ladder and tune.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmu_dist import records, storage
from lmu_dist.config import Config, FailedError, Folder
from lmu_dist.data.manifest import TOKENIZER
from lmu_dist.launch import claim
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.claim import Finished
from lmu_dist.launch.record import read_record, record_path, tell_start
from lmu_dist.launch.recorder import Recorded, Recorder
from lmu_dist.launch.worker import Job, train_worker
from lmu_dist.tracking.spool import Spool
from lmu_dist.tracking.store import Store
from lmu_dist.train import checkpoint

# Settings of the driver's environment that reach workers.
PASSED_ON = ("GLOO_", "GLIBC_TUNABLES", "MALLOC_", "NCCL_", "TORCH_EXTENSIONS_DIR")
# A step asks for the same memory as the one before. Unless told to keep it in one place, glibc's malloc hands large blocks back
# to the kernel, has every page of them made anew, and is slower still in threads, in one of which Ray runs a worker's function:
# up to a fifth of a step on a CPU.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}

Listener = Callable[[dict[str, float]], None]  # newest metrics, about once a second


def run_series(
    cells: Sequence[Cell],
    store: Store,
    study: str = "train",
    listener: Listener = lambda _: None,
    callbacks: Sequence[Any] = (),
    ended: Sequence[str] = claim.RESULTS,
) -> list[Finished]:
    """Trains cells of one trunk, fewest tokens first, from where they stood, and records them. Needs a Ray cluster.

    Raises BusyError if another driver has the trunk, ConfigError, FailedError. With callbacks of Ray Train, these hear of every
    evaluation. `ended`: statuses of runs that are left as they are.
    """
    with claim.alone(cells[0]):
        passed_over = {cell.key: claim.check_resumable(cell) for cell in cells}
        looked = {cell.key: claim.find_done(cell, store, study, ended=ended) for cell in cells}
        done = {key: found for key, found in looked.items() if found is not None}
        missing = [cell for cell in cells if cell.key not in done]
        if missing:
            run_ids = [claim.open_run(cell, store, study) for cell in missing]
            for cell in missing:
                record_path(cell).unlink(missing_ok=True)  # of a run that was stopped and is to go on
                storage.write_whole(cell.folder / TOKENIZER, (cell.corpus.folder / TOKENIZER).read_bytes())
            undelivered = _run(missing, run_ids, store, listener, callbacks)
            for cell, run_id in zip(missing, run_ids, strict=True):
                remarks = claim.notes(passed_over[cell.key], undelivered)
                done[cell.key] = Finished(cell, read_record(cell), run_id, store.uri, False, remarks)
    return [done[cell.key] for cell in cells]


def _run(cells: list[Cell], run_ids: list[str], store: Store, listener: Listener, callbacks: Sequence[Any]) -> str:
    """Runs the workers to their end. Returns what of the record still waits for MLflow."""
    runs = [
        Recorded(cell.folder, run_id, {} if Spool.exists(cell.folder) else store.last_steps(run_id))
        for cell, run_id in zip(cells, run_ids, strict=True)
    ]
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=3, max_task_retries=3)(Recorder)
    credentials = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "AWS_"))}
    recorder: Any = actor.remote(runs, store.uri, credentials)

    def tell(index: int, kind: str, *arguments: Any) -> None:
        recorder.tell.remote(index, kind, *arguments)

    for i, cell in enumerate(cells):
        tell_start(cell, lambda kind, *arguments, i=i: tell(i, kind, *arguments))
    status, undelivered = records.INTERRUPTED, "the recorder is gone"
    try:
        first = cells[0]
        for cell in cells:
            checkpoint.prune(cell.folder, cell.config.cluster.keep_checkpoints)
        with _listening(recorder, listener):
            job = Job(tuple(cells), recorder, bool(callbacks))
            fit(train_worker, {"job": job}, first.config, first.trunk_folder, callbacks)
    except FailedError:
        status = records.FAILED
        raise
    finally:
        with suppress(RayError):  # a recorder that is gone must not hide why
            for i, cell in enumerate(cells):
                if not record_path(cell).exists():
                    tell(i, "tags", {"lmu.status": status})
                    tell(i, "end", status)
            undelivered = cast(str, ray.get(recorder.close.remote(claim.DELIVERY_SECONDS)))
    return undelivered


def fit(
    worker: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    config: Config,
    folder: Folder,
    callbacks: Sequence[Any] = (),
) -> None:
    """Runs a worker function to its end with Ray Train, on the workers that `config.cluster` asks for; Ray keeps its files in
    `folder`. Raises FailedError.
    """
    cluster = config.cluster
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    # A cluster that runs already does not inherit what is set here.
    environment = KEEP_MEMORY | {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
    environment["DS_ACCELERATOR"] = "cuda" if cluster.gpus_per_worker else "cpu"
    # Whether a run can ever fit is checked before it starts; then it may have to wait for nodes or for others to end.
    # One that can do with fewer workers counts again soon: Ray may have counted on a node that is dead already.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "30" if cluster.min_workers else "1800"
    trainer = TorchTrainer(
        worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.n_workers) if cluster.min_workers else cluster.n_workers,
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
            placement_strategy=cluster.placement,
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent) if isinstance(folder, Path) else folder.parent.path,
            # The same client as elsewhere: pyarrow's own reads fewer of the settings in the environment.
            storage_filesystem=None if isinstance(folder, Path) else PyFileSystem(FSSpecHandler(folder.fs)),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=20 if cluster.min_workers else 3
            ),
            worker_runtime_env={"env_vars": environment},
            callbacks=list(callbacks),
        ),
    )
    # Which checkpoint to go on from is decided by what is whole in the folder, not by what Ray remembers of it.
    (folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as e:  # how Ray ends after Ctrl-C
        raise KeyboardInterrupt from e
    except (TrainingFailedError, RayError) as e:
        raise FailedError(f"training failed: {_cause(e)}") from e
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)  # Ray leaves its own


@contextmanager
def _listening(recorder: Any, listener: Listener) -> Iterator[None]:
    """Tells the listener about once a second, from a thread of its own."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(1.0):
            try:
                listener(ray.get(recorder.latest.remote()))
            except RayError:
                return

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _cause(error: BaseException) -> str:
    """One line: the last of what a worker said, of the worker that failed and not of those that lost it."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    lines = [[line.strip() for line in str(f).splitlines() if line.strip()] for f in failures]
    last = [said[-1] for said in lines if said] or [type(error).__name__]
    return next((line for line in last if "onnection" not in line), last[0])
