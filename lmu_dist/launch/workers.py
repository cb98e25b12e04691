"""Starts workers with Ray Train: a function and its arguments in; it returns when the function has, on every worker.

Called by worker_group and calibrate.
"""

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import RayError
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from lmu_dist import storage
from lmu_dist.config import Config, FailedError, Folder
from lmu_dist.launch.process_group import WorkerBackend

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


class CannotStartError(FailedError):
    """Ray has tried for long to start the workers, and could not."""


class _Trainer(DataParallelTrainer):
    """Ray Train's trainer without two of its helper processes, each of some 115 MB on the head.

    Runs have no Ray Data sets, and launch/trials removes the placement groups of trials that were stopped.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


class _InProcessTrainer(_Trainer):
    """A trainer whose controller runs in the calling process, which must be an actor, and not in another one of 120 MB."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        controller = TrainController(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    config: Config,
    folder: Folder,
    max_failures: int,
    callbacks: Sequence[Any] = (),
) -> None:
    """Runs a training function with Ray Train until it returns, on the workers that `config.cluster` asks for.

    After workers failed they are started again, `max_failures` times. The function joins the process group itself
    (launch/process_group). Ray keeps its files in `folder`. Raises FailedError, and CannotStartError if another attempt
    would not change that.
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
    # It would tell workers that a node is about to go, in a process of its own; they save checkpoints in any case.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    # A trial has nothing else to do while the workers run; the main thread of a driver must answer Ctrl-C, as Ray's does.
    trainer_class = _InProcessTrainer if ray.get_runtime_context().get_actor_id() else _Trainer
    trainer = trainer_class(
        worker,
        train_loop_config=arguments,
        backend_config=WorkerBackend(),
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
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=20 if cluster.min_workers else 3),
            worker_runtime_env={"env_vars": environment},
            callbacks=list(callbacks),
        ),
    )
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as e:  # Ray exits this way after Ctrl-C
        raise KeyboardInterrupt from e
    except (TrainingFailedError, RayError) as e:
        timed_out = isinstance(e, ControllerError) and isinstance(e.controller_failure, WorkerGroupStartupTimeoutError)
        raise (CannotStartError if timed_out else FailedError)(f"training failed: {_last_line(e)}") from e
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)  # Ray does not restore it


def _last_line(error: BaseException) -> str:
    """The last line of the error of the worker that failed first, rather than of a worker that lost its connection to it."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    lines = [[line.strip() for line in str(f).splitlines() if line.strip()] for f in failures]
    last = [text[-1] for text in lines if text] or [type(error).__name__]
    line = next((line for line in last if "onnection" not in line), last[0])
    return storage.error_text(re.sub(r"^lmu_dist\.config\.types\.\w+: ", "", line))
