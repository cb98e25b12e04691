"""The driver of one run: a Config in, a trained and recorded run out. Starts Ray if there is none, and cleans up after it.

`train` does what `lmu-dist train` does; progress goes to a listener, so nothing here prints.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, cast

import ray
from filelock import FileLock, Timeout
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lmu_dist import config as configuration
from lmu_dist import records
from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.data.corpus import TOKENIZER
from lmu_dist.data.prepare import Progress, is_prepared, prepare
from lmu_dist.launch.cell import Cell, make_cell
from lmu_dist.launch.cluster import check_before, cluster
from lmu_dist.launch.record import record_of_cell, tell_result, tell_start
from lmu_dist.launch.recorder import Recorder
from lmu_dist.launch.worker import Job, Outcome, train_worker
from lmu_dist.records import RunRecord
from lmu_dist.tracking.delivery import Courier, limit_retries
from lmu_dist.tracking.spool import Spool
from lmu_dist.tracking.store import Store, record_of
from lmu_dist.train import checkpoint

DELIVERY_SECONDS = 60.0  # how long the end of a run waits for MLflow before it leaves the rest to the next start
Listener = Callable[[dict[str, float]], None]  # newest metrics, about once a second


@dataclass(frozen=True)
class Finished:
    """A run that ended, for the summary."""

    cell: Cell
    record: RunRecord
    run_id: str
    tracking_uri: str
    already_done: bool
    notes: tuple[str, ...]  # what a person should know: checkpoints passed over, a record not yet delivered


def train(
    config: Config, tracking_uri: str, progress: Progress = lambda *_: None, listener: Listener = lambda _: None
) -> Finished:
    """Prepares the data if need be, trains the cell from where it stood, records it. Raises ConfigError, FailedError.

    A cell that has ended is not run again: its record is delivered, if part of it still waits, and returned.
    """
    limit_retries()
    store = Store(tracking_uri)
    check_before(config)
    if not is_prepared(config.data, config.storage_folder):
        store.check()  # before hours of preparing; later an absent store is no obstacle to a run it knows
    cell = make_cell(config, prepare(config.data, config.storage_folder, progress))
    cell.corpus.tokenizer()
    if (done := _find_done(cell, store)) is not None:
        return done
    passed_over = _check_resumable(cell)
    with cluster(config), _alone(cell):
        run_id = _open_run(cell, store)
        shutil.copyfile(cell.corpus.folder / TOKENIZER, cell.folder / TOKENIZER)
        outcome, undelivered = _run(cell, store, run_id, listener)
    return Finished(cell, record_of_cell(cell, outcome), run_id, store.uri, False, _notes(passed_over, undelivered))


def _find_done(cell: Cell, store: Store) -> Finished | None:
    """The finished run of this cell: from its folder, where it is newest, else from MLflow, where others may have put it.

    What MLflow has not heard yet is delivered; all of it, if this store never knew the run.
    """
    path = cell.folder / "record.json"
    if path.exists():
        record, run_id = RunRecord(**json.loads(path.read_text())), _open_run(cell, store)
        undelivered = Courier(Spool(cell.folder, run_id), store.uri).close(DELIVERY_SECONDS)
        return Finished(cell, record, run_id, store.uri, True, _notes([], undelivered))
    try:
        run = store.find_run(cell.key)
    except ConfigError:
        if _remembered(cell, store) is None:
            raise
        return None  # begun here and not ended; the record of it can wait
    record = record_of(run) if run else None
    if run is None or record is None or record.status not in records.ENDED:
        return None
    elsewhere = run.data.tags.get("lmu.folder")
    note = f"MLflow has this run as done in {elsewhere}, which is not here; to train it again delete the run there"
    return Finished(cell, record, run.info.run_id, store.uri, True, () if cell.folder.is_dir() else (note,))


def _check_resumable(cell: Cell) -> list[str]:
    """The damaged checkpoints that will be passed over. Raises ConfigError if the one to go on from does not fit."""
    path, meta, passed_over = checkpoint.newest_intact(cell.folder)
    wanted = cell.config.cluster
    if meta is not None and (meta.world_size, meta.zero_stage) != (wanted.n_workers, wanted.zero_stage):
        raise ConfigError(
            f"{path} was written by {meta.world_size} workers at ZeRO stage {meta.zero_stage}; go on with "
            f"cluster.n_workers={meta.world_size} cluster.zero_stage={meta.zero_stage}"
        )
    return passed_over


@contextmanager
def _alone(cell: Cell) -> Iterator[None]:
    """Holds the run's folder against a second driver."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cell.folder / "lock", timeout=0):
            yield
    except Timeout as e:
        raise ConfigError(f"{cell.name} is being run by another process; wait for it, or change the configuration") from e


def _notes(passed_over: list[str], undelivered: str) -> tuple[str, ...]:
    late = f"MLflow has not all of the record yet, the same command delivers the rest: {undelivered}"
    return (*passed_over, *([late] if undelivered else []))


def _open_run(cell: Cell, store: Store) -> str:
    """The MLflow run of the cell: the one it has, or a new one under its experiment's study.

    A store that is away is no obstacle if the run was opened in it before: the spool waits.
    """
    try:
        if (run := store.find_run(cell.key)) is not None:
            run_id = run.info.run_id
        else:
            experiment_id, study_id = store.open_study(cell.config.experiment, "train")
            run_id = store.create_run(experiment_id, study_id, cell.name, cell.key)
    except ConfigError:
        if (known := _remembered(cell, store)) is not None:
            return known
        raise
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "run.json").write_text(json.dumps({"tracking_uri": store.uri, "run_id": run_id}))
    return run_id


def _remembered(cell: Cell, store: Store) -> str | None:
    """The id under which this store knows the run, from an earlier start."""
    try:
        known = json.loads((cell.folder / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return known["run_id"] if known["tracking_uri"] == store.uri else None


def _run(cell: Cell, store: Store, run_id: str, listener: Listener) -> tuple[Outcome, str]:
    """Runs the workers to their end and tells the record. Returns how it ended and what of the record still waits."""
    last_steps = {} if Spool.exists(cell.folder) else store.last_steps(run_id)
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=3, max_task_retries=3)(Recorder)
    credentials = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "AWS_"))}
    recorder: Any = actor.remote(str(cell.folder), run_id, store.uri, last_steps, credentials)

    def tell(kind: str, *arguments: Any) -> None:
        ray.get(recorder.tell.remote(kind, *arguments))

    tell_start(cell, tell)
    job = Job(
        config=configuration.to_dict(cell.config),
        shape=asdict(cell.shape),
        corpus=str(cell.corpus.folder),
        folder=str(cell.folder),
        key=cell.key,
        code_digest=cell.code_digest,
        recorder=recorder,
    )
    status, undelivered = records.INTERRUPTED, "the recorder is gone"
    try:
        with _listening(recorder, listener):
            outcome = _fit(cell, job)
        tell_result(cell, outcome, tell)
        status = outcome.status
    except FailedError:
        status = records.FAILED
        raise
    finally:
        with suppress(RayError):  # a recorder that is gone must not hide why
            tell("tags", {"lmu.status": status})
            tell("end", status)
            undelivered = cast(str, ray.get(recorder.close.remote(DELIVERY_SECONDS)))
    partial = cell.folder / "record.json.partial"
    partial.write_text(json.dumps(asdict(record_of_cell(cell, outcome)), indent=1))
    partial.replace(cell.folder / "record.json")
    return outcome, undelivered


def _fit(cell: Cell, job: Job) -> Outcome:
    cluster_config = cell.config.cluster
    resources: dict[str, float] = {"CPU": cluster_config.cpus_per_worker}
    if cluster_config.gpus_per_worker:
        resources["GPU"] = cluster_config.gpus_per_worker
    # A cluster that runs already does not inherit what is set here.
    environment = {k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "GLOO_", "TORCH_EXTENSIONS_DIR"))}
    environment["DS_ACCELERATOR"] = "cuda" if cluster_config.gpus_per_worker else "cpu"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=cluster_config.n_workers,
            use_gpu=bool(cluster_config.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=cell.name,
            storage_path=str(cell.folder.parent),
            failure_config=FailureConfig(max_failures=cluster_config.max_failures, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=cluster_config.keep_checkpoints),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    # Which checkpoint to go on from is decided by what is whole in the folder, not by what Ray remembers of it.
    (cell.folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    checkpoint.prune(cell.folder, cluster_config.keep_checkpoints)
    handler = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except SystemExit as e:  # how Ray ends after Ctrl-C
        raise KeyboardInterrupt from e
    except (TrainingFailedError, RayError) as e:
        raise FailedError(f"training failed: {_cause(e)}") from e
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # Ray leaves its own
    assert isinstance(result.return_value, Outcome)
    return result.return_value


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
