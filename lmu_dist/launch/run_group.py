"""Trains a run group: cells of one trunk, one after the other, in one group of Ray Train workers. Returns their records.

Called by trainer, with one cell, and inside a Ray Tune trial by ladder and tune.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.actor import ActorProxy
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
from lmu_dist.launch.claim import FinishedRun
from lmu_dist.launch.metrics_logger import LoggedRun, MetricsLogger, RemoteRunLogger, UploadState
from lmu_dist.launch.record import log_start, read_record, record_path
from lmu_dist.launch.worker import RunGroup, train_worker
from lmu_dist.tracking.metrics_log import MetricsLog
from lmu_dist.tracking.run_file import saved_run_id
from lmu_dist.tracking.store import MLflowUnavailableError, Store
from lmu_dist.train import checkpoint
from lmu_dist.train.export import FAMILY_CODE

# Prefixes of the environment variables of the driver that are set for workers too.
FORWARDED_VARIABLES = ("GLOO_", "GLIBC_TUNABLES", "MALLOC_", "NCCL_", "TORCH_EXTENSIONS_DIR")
# Makes glibc's malloc keep freed memory, since each step asks for the same memory as the one before. By default malloc returns
# large blocks to the kernel, and the page faults of the next step take up to a fifth of a step on a CPU. The default is slower
# still in threads, and Ray runs the training function in one.
MALLOC_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}

MetricsListener = Callable[[dict[str, float]], None]  # called about once a second with the newest metrics


def train_run_group(
    cells: Sequence[Cell],
    store: Store,
    study: str = "train",
    listener: MetricsListener = lambda _: None,
    callbacks: Sequence[Any] = (),
    final_statuses: Sequence[str] = claim.FINAL_STATUSES,
) -> list[FinishedRun]:
    """Trains the cells of one trunk, fewest tokens first, and returns their records. Resumes from their checkpoints.

    Needs a connection to a Ray cluster. Raises BusyError if another driver trains the trunk, ConfigError, FailedError.
    `callbacks` of Ray Train get a report of every evaluation. A run that ended with one of `final_statuses` is not continued.
    """
    skipped = claim.check_resumable(cells, store, study)
    with claim.exclusive_lock(cells[0]):
        finished = {cell.key: claim.find_finished(cell, store, study, final_statuses=final_statuses) for cell in cells}
        done = {key: run for key, run in finished.items() if run is not None}
        missing = [cell for cell in cells if cell.key not in done]
        if missing:
            run_ids = [claim.open_run(cell, store, study) for cell in missing]
            for cell in missing:
                record_path(cell).unlink(missing_ok=True)  # left by a run that was stopped early and is now continued
                storage.write_atomic(cell.folder / TOKENIZER, (cell.corpus.folder / TOKENIZER).read_bytes())
                if cell.family_source is not None:
                    storage.write_atomic(cell.folder / FAMILY_CODE, cell.family_source.text.encode())
            states = _run(missing, run_ids, store, study, listener, callbacks)
            for cell, run_id, state in zip(missing, run_ids, states, strict=True):
                notes = claim.notes(skipped[cell.key], state.not_uploaded, state.notes)
                run_id = run_id or saved_run_id(cell.folder, store.uri) or ""
                done[cell.key] = FinishedRun(cell, read_record(cell), run_id, store.uri, False, notes)
    return [done[cell.key] for cell in cells]


def _run(
    cells: list[Cell],
    run_ids: list[str | None],
    store: Store,
    study: str,
    listener: MetricsListener,
    callbacks: Sequence[Any],
) -> list[UploadState]:
    """Runs the workers until they end. Returns what MLflow has of each run."""
    runs = [
        LoggedRun(cell.folder, run_id, claim.run_identity(cell, study), _last_steps(cell, run_id, store))
        for cell, run_id in zip(cells, run_ids, strict=True)
    ]
    this_node: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class = ray.remote(num_cpus=0, scheduling_strategy=this_node, max_restarts=3, max_task_retries=3)(MetricsLogger)
    credentials = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "AWS_"))}
    metrics_logger: ActorProxy[MetricsLogger] = actor_class.remote(runs, store.uri, credentials)
    run_loggers = [RemoteRunLogger(metrics_logger, i) for i in range(len(cells))]
    for cell, run_logger in zip(cells, run_loggers, strict=True):
        log_start(cell, run_logger)
    status, states = records.INTERRUPTED, [UploadState("the process that uploads the metrics is gone", [])] * len(cells)
    try:
        first = cells[0]
        for cell in cells:
            checkpoint.prune(cell.folder, cell.config.cluster.keep_checkpoints)
        with _poll_metrics(metrics_logger, listener):
            group = RunGroup(tuple(cells), metrics_logger, report_to_tune=bool(callbacks))
            run_workers(train_worker, {"group": group}, first.config, first.trunk_folder, callbacks)
    except FailedError:
        status = records.FAILED
        raise
    finally:
        with suppress(RayError):  # if the actor is gone, the error of the workers is the one to raise
            for cell, run_logger in zip(cells, run_loggers, strict=True):
                if not record_path(cell).exists():
                    run_logger.set_tags({"lmu.status": status})
                    run_logger.end_run(status)
            states = ray.get(metrics_logger.close.remote(claim.UPLOAD_TIMEOUT_SECONDS))
    return states


def _last_steps(cell: Cell, run_id: str | None, store: Store) -> dict[str, int]:
    """The last step of each metric that MLflow has of a run whose log is not on this machine."""
    if run_id is None or MetricsLog.is_complete(cell.folder):
        return {}
    try:
        return store.last_steps(run_id)
    except MLflowUnavailableError:
        if storage.is_remote(cell.folder):
            raise
        return {}  # a run in a local folder whose log is missing has logged nothing


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    config: Config,
    folder: Folder,
    callbacks: Sequence[Any] = (),
) -> None:
    """Runs a training function with Ray Train until it returns, on the workers that `config.cluster` asks for.

    Ray keeps its files in `folder`. Raises FailedError.
    """
    cluster = config.cluster
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    # The nodes of a running cluster do not inherit the environment of this process.
    environment = MALLOC_SETTINGS | {k: v for k, v in os.environ.items() if k.startswith(FORWARDED_VARIABLES)}
    environment["DS_ACCELERATOR"] = "cuda" if cluster.gpus_per_worker else "cpu"
    # Whether the cluster can ever hold the run was checked before; here the run may wait for nodes, or for other runs to end.
    # With min_workers the wait is short, so that Ray counts the nodes again: it may have counted one that is dead.
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
            # The fsspec client that is used everywhere else: pyarrow's own reads fewer of the environment's settings.
            storage_filesystem=None if isinstance(folder, Path) else PyFileSystem(FSSpecHandler(folder.fs)),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=20 if cluster.min_workers else 3
            ),
            worker_runtime_env={"env_vars": environment},
            callbacks=list(callbacks),
        ),
    )
    # The worker chooses the checkpoint to resume from by what is intact in the folder, not by Ray's snapshot.
    (folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as e:  # Ray exits this way after Ctrl-C
        raise KeyboardInterrupt from e
    except (TrainingFailedError, RayError) as e:
        raise FailedError(f"training failed: {_last_line(e)}") from e
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)  # Ray does not restore it


@contextmanager
def _poll_metrics(metrics_logger: ActorProxy[MetricsLogger], listener: MetricsListener) -> Iterator[None]:
    """Calls the listener about once a second with the newest metrics, from a background thread, until the block ends."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(1.0):
            try:
                listener(ray.get(metrics_logger.latest.remote()))
            except RayError:
                return

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _last_line(error: BaseException) -> str:
    """The last line of the error of the worker that failed first, rather than of a worker that lost its connection to it."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    lines = [[line.strip() for line in str(f).splitlines() if line.strip()] for f in failures]
    last = [text[-1] for text in lines if text] or [type(error).__name__]
    line = next((line for line in last if "onnection" not in line), last[0])
    return storage.error_text(re.sub(r"^lmu_dist\.config\.types\.\w+: ", "", line))
