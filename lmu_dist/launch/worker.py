"""The training function of a Ray Train worker: builds data, model and engine, runs the loop, logs metrics, saves checkpoints.

Started by launch/worker_group. It takes one RunGroup after the other, cells that share a trunk, from launch/work_queue. Rank 0
logs through launch/metrics_logger; every rank uploads its own checkpoint files.
"""

import functools
import gc
import json
import math
import os
import platform
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import ray.train.torch
import ray.util
import torch
import torch.distributed as dist
from ray.actor import ActorProxy

from lmu_dist import records, storage
from lmu_dist.config import ClusterConfig, Folder
from lmu_dist.data.batches import TokenDataset
from lmu_dist.launch import process_group, start_point
from lmu_dist.launch.cell import BRANCH_POINTS, Cell
from lmu_dist.launch.collectives import all_ranks, broadcast_from_rank0, patient_group
from lmu_dist.launch.curves import TrainingCurves
from lmu_dist.launch.engine_import import import_engine
from lmu_dist.launch.metrics_logger import MetricsLogger, RemoteRunLogger
from lmu_dist.launch.record import Outcome, log_result, record_of_cell, record_path, write_record
from lmu_dist.launch.start_point import StartPoint, find_start_point, state_for_cell
from lmu_dist.launch.work_queue import RunGroup, WorkQueue
from lmu_dist.models import registry
from lmu_dist.records import EvalMetrics
from lmu_dist.train import checkpoint
from lmu_dist.train.divergence import divergence_reason, running_mean
from lmu_dist.train.model import build_model
from lmu_dist.train.schedule import phase
from lmu_dist.train.weights import write_weights


def train_worker(queue: ActorProxy[WorkQueue], metrics_logger: ActorProxy[MetricsLogger], group: str) -> None:
    """Trains run groups, one after the other, until the queue has no more for this group of workers.

    Collective: runs on every rank.
    """
    import_engine()
    process_group.join()
    gc.freeze()  # to free an engine takes a search for unreachable objects, half a second if it visits those of all imports
    rank = dist.get_rank()

    def next_run_group() -> RunGroup | None:
        return ray.get(queue.next_run_group.remote(group))

    while (run_group := broadcast_from_rank0(next_run_group, rank, patient_group())) is not None:
        _train_run_group(run_group, metrics_logger, rank, group)
    dist.destroy_process_group()


def _train_run_group(group: RunGroup, metrics_logger: ActorProxy[MetricsLogger], rank: int, workers: str) -> None:
    """Trains the cells of a group, each from its newest intact checkpoint until it completes or diverges. Collective.

    `workers`: the name of the group of workers.
    """
    from lmu_dist.train.engine import Engine

    first = group.cells[0]
    if first.family_source is not None:
        registry.register(first.family_source)
    device = _device(first.config.cluster)
    engine: Engine | None = None
    trunk_divergence: Outcome | None = None  # of a cell that diverged before its decay; later cells take the same steps
    for cell, logged_run in zip(group.cells, group.runs, strict=True):
        if broadcast_from_rank0(lambda cell=cell: record_path(cell).exists(), rank):
            continue  # ended before the workers were started again
        start = find_start_point(cell)
        if engine is not None and start.checkpoint_folder is None:
            engine.close()
            engine = None
        peak_flops = _peak_flops(cell.config.train.precision, device)  # before there is an engine
        if engine is None:
            engine = Engine(build_model(cell.config, cell.shape, device), cell.config.train, cell.config.cluster, device)
        if start.checkpoint_folder is not None:
            start_point.load(engine, start)
        logger = RemoteRunLogger(metrics_logger, logged_run) if rank == 0 else None
        run = _CellRun(cell, engine, rank, logger, start.attempt_id, peak_flops, group.report_to_tune, workers)
        outcome = _train_cell(run, start, trunk_divergence)
        if outcome.status == records.DIVERGED:
            # An aborted step leaves gradients and a micro-batch count in the engine; loading a checkpoint does not reset them.
            engine.close()
            engine = None
            if outcome.state.step < cell.config.train.decay_start:
                trunk_divergence = outcome
        run.end(outcome)
    if engine is not None:
        engine.close()


def _device(cluster: ClusterConfig) -> torch.device:
    """The device of this worker, limited to its share: Ray counts shares of CPUs and GPUs and enforces none."""
    device = ray.train.torch.get_device()
    if device.type == "cuda" and cluster.gpus_per_worker < 1:
        torch.cuda.set_per_process_memory_fraction(cluster.gpus_per_worker, device)
    torch.set_num_threads(cluster.cpus_per_worker)
    return device


def _train_cell(run: "_CellRun", start: StartPoint, trunk_divergence: Outcome | None) -> Outcome:
    """Trains a cell, unless a cell of its trunk has diverged at a step that this one would take too."""
    if trunk_divergence is None or start.is_own_checkpoint:
        return run.train(replace(start.state, world_size=dist.get_world_size()))
    state = trunk_divergence.state
    return replace(trunk_divergence, state=state_for_cell(state, run.cell, fork_step=state.step))


@functools.cache
def _peak_flops(precision: str, device: torch.device) -> float:
    """FLOP/s of all workers together in a matrix product, measured once. Collective."""
    from lmu_dist.train.engine import matmul_peak

    of_all = torch.tensor(matmul_peak(precision, device), dtype=torch.float64, device=device)
    dist.all_reduce(of_all)
    return of_all.item()


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

    def __init__(
        self,
        cell: Cell,
        engine: Any,
        rank: int,
        logger: RemoteRunLogger | None,
        attempt_id: str,
        peak_flops: float,
        report_to_tune: bool,
        workers: str,
    ) -> None:
        """`logger`: on rank 0 only. `peak_flops`: measured FLOP/s of all workers, see matmul_peak. `workers`: their group."""
        self.cell, self.engine, self.rank, self.logger = cell, engine, rank, logger
        self.attempt_id, self.peak_flops, self.report_to_tune, self.workers = attempt_id, peak_flops, report_to_tune, workers
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
        flops = self.cell.flops.training
        stream = train_rows(
            engine, self.rows, train, config.seed, state.step, lambda: state.val_losses, self.rank, self.world_size
        )
        curves = self.logger and TrainingCurves(self.logger.log_metrics, train, state.fork_step, flops, self.peak_flops)
        for metrics in stream:
            self.uploader.raise_error()
            if curves is not None:
                curves.add(metrics)
            seconds = state.training_seconds + metrics.step_seconds
            mean = running_mean(state.mean_loss_nats, metrics.loss_nats if metrics.finite else math.nan)
            state = replace(state, train_loss_nats=metrics.loss_nats, training_seconds=seconds)
            if rule := divergence_reason(train, mean, state.best_mean_loss_nats):
                if curves is not None:
                    curves.log_last()
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
                if curves is not None:
                    curves.log_last()
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
        tags["lmu.worker_group"] = self.workers
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
        _, found = start_point.newest_branch_point(self.cell, state.step, all_ranks())
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
                    write_weights(local, state, weights)
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
        dist.barrier(patient_group())  # until the files of all ranks are in storage
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
