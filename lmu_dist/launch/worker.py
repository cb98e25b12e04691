"""The training function of a Ray Train worker: builds data, model and engine, runs the loop, logs metrics, saves checkpoints.

Started by launch/run_group with a RunGroup: cells that share a trunk. Rank 0 logs through launch/metrics_logger; every rank
uploads its own checkpoint files.
"""

import functools
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray.train
import ray.train.torch
import ray.util
import torch
import torch.distributed as dist
from ray.actor import ActorProxy

from lmu_dist import config as configuration
from lmu_dist import records, storage
from lmu_dist.config import Folder
from lmu_dist.data.batches import TokenDataset
from lmu_dist.launch.cell import BRANCH_POINTS, Cell, build_model
from lmu_dist.launch.metrics_logger import MetricsLogger, RemoteRunLogger
from lmu_dist.launch.record import Outcome, log_result, record_of_cell, record_path, write_record
from lmu_dist.models import accounting, registry
from lmu_dist.records import EvalMetrics
from lmu_dist.toolchain import configure_extension_builds
from lmu_dist.train import VERSION, checkpoint
from lmu_dist.train.divergence import divergence_reason, running_mean
from lmu_dist.train.schedule import phase

UPLOAD_TIMEOUT_SECONDS = 6 * 3600.0  # how long ranks wait for the upload of another rank's part of a checkpoint


@dataclass(frozen=True)
class RunGroup:
    """Cells that one group of workers trains one after the other: the argument of `train_worker`."""

    cells: tuple[Cell, ...]  # of one trunk, fewest tokens first
    metrics_logger: ActorProxy[MetricsLogger]
    report_to_tune: bool  # whether Ray Tune gets a report of every evaluation


class StartPoint(NamedTuple):
    """Where the training of a cell starts: from a checkpoint of the cell, from a branch point of its trunk, or at step 0."""

    checkpoint_folder: Folder | None  # None: start at step 0
    is_own_checkpoint: bool  # of this cell, not of another cell of the trunk
    state: checkpoint.Meta
    attempt_id: str  # unique: no other attempt of any run has it


def train_worker(arguments: dict[str, RunGroup]) -> None:
    """Trains the cells of a group, each from its newest intact checkpoint until it completes or diverges.

    Collective: runs on every rank.
    """
    group = arguments["group"]
    configure_extension_builds()
    # Imported here because importing DeepSpeed takes four seconds, and the driver imports this file without using it.
    from lmu_dist.train.engine import Engine

    first, rank = group.cells[0], ray.train.get_context().get_world_rank()
    if first.family_source is not None:
        registry.register(first.family_source)
    device = ray.train.torch.get_device()
    torch.set_num_threads(first.config.cluster.cpus_per_worker)
    engine: Engine | None = None
    trunk_divergence: Outcome | None = None  # of a cell that diverged before its decay; later cells take the same steps
    for index, cell in enumerate(group.cells):
        if broadcast_from_rank0(lambda cell=cell: record_path(cell).exists(), rank):
            continue  # ended before the workers were started again
        start = _find_start_point(cell)
        if engine is not None and start.checkpoint_folder is None:
            engine.close()
            engine = None
        peak_flops = _peak_flops(cell.config.train.precision, device)  # before there is an engine
        if engine is None:
            engine = Engine(build_model(cell.config, cell.shape, device), cell.config.train, cell.config.cluster, device)
        if start.checkpoint_folder is not None:
            _load(engine, start)
        run = _CellRun(group, index, engine, rank, start.attempt_id, peak_flops)
        if trunk_divergence is not None and not start.is_own_checkpoint:
            # This cell would take the same steps and diverge at the same step.
            state = trunk_divergence.state
            outcome = replace(trunk_divergence, state=_state_for_cell(state, cell, fork_step=state.step))
        else:
            outcome = run.train(replace(start.state, world_size=dist.get_world_size()))
        if outcome.status == records.DIVERGED:
            # An aborted step leaves gradients and a micro-batch count in the engine; loading a checkpoint does not reset them.
            engine.close()
            engine = None
            if outcome.state.step < cell.config.train.decay_start:
                trunk_divergence = outcome
        run.end(outcome)


@functools.cache
def _peak_flops(precision: str, device: torch.device) -> float:
    """FLOP/s of all workers together in a matrix product, measured once. Collective."""
    from lmu_dist.train.engine import matmul_peak

    of_all = torch.tensor(matmul_peak(precision, device), dtype=torch.float64, device=device)
    dist.all_reduce(of_all)
    return of_all.item()


@functools.cache
def _upload_group() -> dist.ProcessGroup:
    """The process group in which ranks wait for each other's uploads, which may take longer than a step. Collective."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=UPLOAD_TIMEOUT_SECONDS))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _local_checkpoint_folder() -> Path:
    """A new local folder for this rank's part of a checkpoint. Deletes those that killed workers of this machine left."""
    # Containers that share the folder and a host name have other namespaces of process ids.
    namespace = Path("/proc/self/ns/pid")
    prefix = f"lmu-dist-checkpoint-{platform.node()}-{namespace.stat().st_ino if namespace.exists() else 0}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))


class _CellRun:
    """The training of one cell on this rank."""

    def __init__(self, group: RunGroup, index: int, engine: Any, rank: int, attempt_id: str, peak_flops: float) -> None:
        self.cell, self.report_to_tune = group.cells[index], group.report_to_tune
        self.engine, self.rank, self.attempt_id = engine, rank, attempt_id
        self.peak_flops = peak_flops  # measured FLOP/s of all workers, see matmul_peak
        self.logger = RemoteRunLogger(group.metrics_logger, index) if rank == 0 else None
        self.world_size = dist.get_world_size()
        self.uploader, self.upload_to = checkpoint.Uploader(), None  # the folder that the running upload's checkpoint goes to
        corpus, sequence_tokens = self.cell.corpus, self.cell.config.train.sequence_tokens
        self.rows: TokenDataset = corpus.rows("train", sequence_tokens)
        self.held_out: TokenDataset = corpus.rows("validation", sequence_tokens)
        self.bytes_per_token = corpus.manifest.bytes_per_token("validation")

    def train(self, state: checkpoint.Meta) -> Outcome:
        """Runs the training steps from `state` until the run completes or diverges."""
        from lmu_dist.train.loop import train_rows

        config, engine = self.cell.config, self.engine
        train, cluster = config.train, config.cluster
        self.log_attempt()
        engine.reset_peak()
        flops = accounting.flops(self.cell.shape).training
        stream = train_rows(
            engine, self.rows, train, config.seed, state.step, lambda: state.val_losses, self.rank, self.world_size
        )
        for metrics in stream:
            self.uploader.raise_error()
            if self.logger is not None:
                self.logger.log_metrics(metrics.step, metrics.values(train.batch_tokens, flops, self.peak_flops))
            seconds = state.training_seconds + metrics.step_seconds
            mean = running_mean(state.mean_loss_nats, metrics.loss_nats if metrics.finite else math.nan)
            state = replace(state, train_loss_nats=metrics.loss_nats, training_seconds=seconds)
            if rule := divergence_reason(train, mean, state.best_mean_loss_nats):
                return Outcome(records.DIVERGED, "undecayed", rule, state)
            best = min(mean, state.best_mean_loss_nats)
            state = replace(state, step=metrics.step + 1, mean_loss_nats=mean, best_mean_loss_nats=best)
            last = state.step == train.n_steps
            branch_point_now = train.schedule == "wsd" and state.step == train.decay_start
            evaluate_now = state.step % train.eval_every_steps == 0 or last
            save_now = state.step % cluster.checkpoint_every_steps == 0 or last
            check_now = evaluate_now or save_now or branch_point_now
            if check_now and not math.isfinite(self.validate(state.step, train.sequence_tokens).loss_nats):
                # The step was finite, but the new weights give no finite loss: they must not become the last good checkpoint.
                return Outcome(records.DIVERGED, "undecayed", "non-finite loss", state)
            if evaluate_now:
                state = self.evaluate(state)
            # The branch point first: a run that resumes from its own checkpoint at this step does not come back to save it.
            if branch_point_now and not self.has_branch_point(state):
                self.save(state, self.cell.trunk_folder / BRANCH_POINTS)
            if save_now:
                self.flush_log(state.step)
                self.save(state, self.cell.folder)
        return Outcome(records.COMPLETE, phase(train, state.step), "", state)

    def log_attempt(self) -> None:
        """Logs that the workers have started, how many there are, and which implementation of the mixer they run."""
        config, engine = self.cell.config, self.engine
        zero_stage = config.cluster.zero_stage
        tags = {"lmu.status": records.RUNNING, "lmu.n_workers": self.world_size, "lmu.zero_stage": zero_stage}
        family = registry.family_of(self.cell.shape)
        options = registry.options_of(family, config.model.options)
        if implementation := family.operator(self.cell.shape, options, engine.dtype, engine.device):
            tags["lmu.operator"] = implementation
        if self.logger is not None:
            self.logger.start_attempt(self.attempt_id, tags)

    def flush_log(self, checkpoint_step: int) -> None:
        """Waits until the metrics up to a checkpoint are on disk.

        Called before the checkpoint is saved: a run that resumes from it does not repeat these steps.
        """
        if self.logger is not None:
            self.logger.set_tags({"lmu.checkpoint_step": checkpoint_step})
            self.logger.flush()

    def has_branch_point(self, state: checkpoint.Meta) -> bool:
        """Whether the trunk already has a branch point at this step, from an earlier attempt."""
        folder = self.cell.trunk_folder / BRANCH_POINTS
        _, found = checkpoint.newest_branch_point(folder, state.step, state.zero_stage, _ranks())
        return found is not None and found.step == state.step

    def evaluate(self, state: checkpoint.Meta) -> checkpoint.Meta:
        """Runs a full validation, logs it, and returns the state with its result."""
        evaluation = self.validate(state.step, self.cell.config.train.eval_tokens)
        memory = {records.WORKER_BYTES: self.engine.max_over_ranks(self.engine.peak_bytes())}
        if self.logger is not None:
            self.logger.log_metrics(state.step - 1, evaluation.values() | memory)
        state = replace(state, val_losses=[*state.val_losses, evaluation.loss_nats], evaluation=asdict(evaluation))
        if self.report_to_tune:
            tokens = state.step * self.cell.config.train.batch_tokens
            ray.train.report({"tokens": tokens, "val_loss_nats": evaluation.loss_nats, "state": json.dumps(asdict(state))})
        return state

    def validate(self, step: int, n_tokens: int) -> EvalMetrics:
        """The loss over about `n_tokens` of the validation split."""
        from lmu_dist.train.evaluate import evaluate, evaluated_rows

        indices = evaluated_rows(self.held_out, n_tokens)
        return evaluate(self.engine, self.held_out, indices, self.rank, self.world_size, step, self.bytes_per_token)

    def save(self, state: checkpoint.Meta, to: Folder) -> None:
        """Saves a checkpoint: each rank writes its files to local disk, and uploads them while training continues."""
        self.finish_upload()
        local = _local_checkpoint_folder()
        try:
            with storage.full_disk_errors(local):
                self.engine.save(local)
                weights = self.engine.weights()
                if self.rank == 0:
                    checkpoint.write_weights(local, state, weights)
        except BaseException:
            shutil.rmtree(local, ignore_errors=True)
            raise
        name = checkpoint.folder_name(state.step, state.world_size, self.attempt_id)
        self.uploader.start(local, to / name, self.rank, state.world_size)
        self.upload_to = to

    def finish_upload(self) -> None:
        """Waits until the last saved checkpoint is in storage, then deletes old checkpoints. Raises the error of the upload."""
        if self.upload_to is None:
            return
        self.uploader.wait()
        dist.barrier(_upload_group())  # until the files of all ranks are in storage
        if self.rank == 0 and self.upload_to == self.cell.folder:
            checkpoint.prune(self.upload_to, self.cell.config.cluster.keep_checkpoints)
        self.upload_to = None

    def end(self, outcome: Outcome) -> None:
        """Waits for the last checkpoint. Then rank 0 logs how the run ended, and writes its record.json."""
        self.finish_upload()
        if self.logger is None:
            return
        record = record_of_cell(self.cell, outcome)
        log_result(record, outcome.evaluation, self.logger)
        self.logger.end_run(outcome.status)
        self.logger.flush()
        write_record(self.cell, record)


def _load(engine: Any, start: StartPoint) -> None:
    """Loads a checkpoint, of any number of workers. At stage 0 it is downloaded first, once per node."""
    folder = start.checkpoint_folder
    assert folder is not None
    if start.state.zero_stage > 0 or isinstance(folder, Path):
        engine.load(folder)
        return
    # Named by IP address, as Ray counts local ranks: workers at one address share a disk, and several nodes may share one too.
    name = f"lmu-dist-{start.attempt_id}-{ray.util.get_node_ip_address()}"
    local, is_first = Path(tempfile.gettempdir()) / name, os.environ["LOCAL_RANK"] == "0"
    try:
        if is_first:
            checkpoint.download_shared_shards(folder, local)
        dist.barrier()
        engine.load(local)
        dist.barrier()
    finally:
        if is_first:
            shutil.rmtree(local, ignore_errors=True)


def _ranks() -> checkpoint.Ranks:
    """All workers, which check checkpoints together."""

    def gather(mine: Any) -> list[Any]:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return everyone

    return checkpoint.Ranks(dist.get_rank(), dist.get_world_size(), gather)


def _find_start_point(cell: Cell) -> StartPoint:
    """The cell's newest intact checkpoint; else the latest usable branch point of its trunk; else step 0. Collective."""
    ranks, cluster = _ranks(), cell.config.cluster
    attempt_id = ranks.on_first(lambda: f"{time.time_ns():x}")
    folder, state, _ = checkpoint.newest_intact(cell.folder, ranks)
    if state is not None:
        return StartPoint(folder, True, state, attempt_id)
    if cell.config.train.schedule == "wsd":
        branch_points, decay_start = cell.trunk_folder / BRANCH_POINTS, cell.config.train.decay_start
        folder, state = checkpoint.newest_branch_point(branch_points, decay_start, cluster.zero_stage, ranks)
        if state is not None and state.key == cell.key:
            return StartPoint(folder, True, state, attempt_id)
        if state is not None:
            return StartPoint(folder, False, _state_for_cell(state, cell, fork_step=state.step), attempt_id)
    manifest = cell.corpus.manifest
    fresh = checkpoint.Meta(
        step=0,
        key=cell.key,
        world_size=dist.get_world_size(),
        zero_stage=cluster.zero_stage,
        data_digest=manifest.data_digest,
        tokenizer_digest=manifest.tokenizer_digest,
        code_digest=cell.code_digest,
        family_version=cell.family_version,
        train_version=VERSION,
        config=configuration.to_dict(cell.config),
        shape=cell.shape.to_dict(),
    )
    return StartPoint(None, False, fresh, attempt_id)


def _state_for_cell(state: checkpoint.Meta, cell: Cell, fork_step: int) -> checkpoint.Meta:
    """The state of one cell of a trunk, changed into the state of another cell that branches off at `fork_step`."""
    return replace(state, key=cell.key, config=configuration.to_dict(cell.config), fork_step=fork_step)


def broadcast_from_rank0(compute: Callable[[], Any], rank: int) -> Any:
    """Calls `compute` on rank 0 and returns its result on every rank. A ConfigError is raised on every rank, so that none waits
    forever for another.
    """
    result_and_error: list[Any] = [None, None]
    if rank == 0:
        try:
            result_and_error[0] = compute()
        except configuration.ConfigError as e:
            result_and_error[1] = str(e)
    dist.broadcast_object_list(result_and_error)
    if result_and_error[1] is not None:
        raise configuration.ConfigError(result_and_error[1])
    return result_and_error[0]
