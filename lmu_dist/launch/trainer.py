"""The driver of one run: a Config in, a trained and recorded run out. Starts Ray if there is none, and cleans up after it.

`train` does what `lmu-dist train` does; progress goes to a listener, so nothing here prints.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

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
from lmu_dist.data.prepare import Progress, prepare
from lmu_dist.launch.cell import Cell, git_commit, make_cell
from lmu_dist.launch.cluster import cluster
from lmu_dist.launch.recorder import Recorder
from lmu_dist.launch.worker import Job, Outcome, train_worker
from lmu_dist.models import accounting
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
    cell = make_cell(config, prepare(config.data, config.storage_folder, progress))
    cell.corpus.tokenizer()
    limit_retries()
    store = Store(tracking_uri)
    if (done := _find_done(cell, store)) is not None:
        return done
    passed_over = _check_resumable(cell)
    with cluster(config), _alone(cell):
        run_id = _open_run(cell, store)
        shutil.copyfile(cell.corpus.folder / TOKENIZER, cell.folder / TOKENIZER)
        outcome, undelivered = _run(cell, store, run_id, listener)
    return Finished(cell, _record(cell, outcome), run_id, store.uri, False, _notes(passed_over, undelivered))


def _find_done(cell: Cell, store: Store) -> Finished | None:
    """The finished run of this cell: from its folder, where it is newest, else from MLflow, where others may have put it.

    What MLflow has not heard yet is delivered; all of it, if this store never knew the run.
    """
    path = cell.folder / "record.json"
    if path.exists():
        record, run_id = RunRecord(**json.loads(path.read_text())), _open_run(cell, store)
        undelivered = Courier(Spool(cell.folder, run_id), store.uri).close(DELIVERY_SECONDS)
        return Finished(cell, record, run_id, store.uri, True, _notes([], undelivered))
    run = store.find_run(cell.key)
    record = record_of(run) if run else None
    if run is None or record is None or record.status not in records.ENDED:
        return None
    return Finished(cell, record, run.info.run_id, store.uri, True, ())


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
    """The MLflow run of the cell: the one it has, or a new one under its experiment's study."""
    if (run := store.find_run(cell.key)) is not None:
        return run.info.run_id
    experiment_id, study_id = store.open_study(cell.config.experiment, "train")
    return store.create_run(experiment_id, study_id, cell.name, cell.key)


def _run(cell: Cell, store: Store, run_id: str, listener: Listener) -> tuple[Outcome, str]:
    """Runs the workers to their end and tells the record. Returns how it ended and what of the record still waits."""
    last_steps = {} if Spool.exists(cell.folder) else store.last_steps(run_id)
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    recorder: Any = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=3, max_task_retries=3)(Recorder).remote(
        str(cell.folder), run_id, store.uri, last_steps
    )

    def tell(kind: str, *arguments: Any) -> None:
        ray.get(recorder.tell.remote(kind, *arguments))

    config = configuration.to_dict(cell.config)
    manifest = cell.corpus.manifest
    constants = configuration.flatten({k: config[k] for k in ("data", "model", "train")})
    tell("params", constants | _record(cell, None).columns("params"))
    tell("tags", {"lmu.status": records.RUNNING, "lmu.git_commit": git_commit(), "lmu.folder": str(cell.folder)})
    tell("dataset", manifest.source[:500], manifest.data_digest, str(cell.corpus.folder), {"splits": manifest.splits})
    job = Job(
        config=config,
        shape=asdict(cell.shape),
        corpus=str(cell.corpus.folder),
        folder=str(cell.folder),
        key=cell.key,
        code_digest=cell.code_digest,
        recorder=recorder,
    )
    status = records.INTERRUPTED
    try:
        with _listening(recorder, listener):
            outcome = _fit(cell, job)
        _tell_end(cell, outcome, tell)
        status = outcome.status
    except FailedError:
        status = records.FAILED
        raise
    finally:
        tell("tags", {"lmu.status": status})
        tell("end", status)
        undelivered: Any = ray.get(recorder.close.remote(DELIVERY_SECONDS))
    return outcome, undelivered


def _fit(cell: Cell, job: Job) -> Outcome:
    cluster_config = cell.config.cluster
    resources: dict[str, float] = {"CPU": cluster_config.cpus_per_worker}
    if cluster_config.gpus_per_worker:
        resources["GPU"] = cluster_config.gpus_per_worker
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
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cuda" if cluster_config.gpus_per_worker else "cpu"}},
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as e:
        raise FailedError(f"training failed: {_cause(e)}") from e
    assert isinstance(result.return_value, Outcome)
    return result.return_value


def _tell_end(cell: Cell, outcome: Outcome, tell: Callable[..., None]) -> None:
    """The record, in the run's folder and in MLflow."""
    record = _record(cell, outcome)
    tell("metrics", outcome.state.step, record.columns("metrics"))
    if evaluation := outcome.evaluation:
        curve = evaluation.position_loss_nats
        positions = list(range(1, len(curve) + 1))
        for position, loss in zip(positions, curve, strict=True):
            tell("metrics", position, {records.POSITION_LOSS: loss})
        tell("table", "position_loss", {"position": positions, "loss_nats": list(curve)})
    tell("tags", record.columns("tags"))
    partial = cell.folder / "record.json.partial"
    partial.write_text(json.dumps(asdict(record), indent=1))
    partial.replace(cell.folder / "record.json")


def _record(cell: Cell, outcome: Outcome | None) -> RunRecord:
    """The row of a run; without an outcome, that of one about to start."""
    train, model = cell.config.train, cell.config.model
    counts, flops = accounting.parameters(cell.shape), accounting.flops(cell.shape)
    evaluation = outcome.evaluation if outcome else None
    nan = float("nan")
    return RunRecord(
        family=model.family,
        n_params=counts.non_embedding,
        n_params_with_head=counts.with_head,
        n_params_total=counts.total,
        d_model=cell.shape.d_model,
        n_blocks=cell.shape.n_blocks,
        sequence_tokens=train.sequence_tokens,
        vocab_tokens=cell.shape.vocab_tokens,
        planned_tokens=train.n_steps * train.batch_tokens,
        planned_steps=train.n_steps,
        batch_tokens=train.batch_tokens,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        precision=train.precision,
        seed=cell.config.seed,
        training_flops_per_token=flops.training,
        training_flops_per_token_kaplan=flops.training_kaplan,
        data_digest=cell.corpus.manifest.data_digest,
        code_digest=cell.code_digest,
        tokens=outcome.state.step * train.batch_tokens if outcome else 0,
        steps=outcome.state.step if outcome else 0,
        train_loss_nats=outcome.state.train_loss_nats if outcome else nan,
        val_loss_nats=evaluation.loss_nats if evaluation else nan,
        val_loss_standard_error_nats=evaluation.standard_error_nats if evaluation else nan,
        val_bits_per_byte=evaluation.bits_per_byte if evaluation else nan,
        training_seconds=outcome.state.training_seconds if outcome else 0.0,
        key=cell.key,
        status=outcome.status if outcome else records.RUNNING,
        phase=outcome.phase if outcome else "undecayed",
        stop_rule=outcome.stop_rule if outcome else "",
    )


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
    """The last line of what a worker said, without Ray's frames around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
