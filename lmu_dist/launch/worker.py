"""What runs inside a Ray Train worker: wires data, model, engine and loop together, then listens to the loop.

Started by launch/series with a Job, a row of cells that share a trunk; tells the recorder; hands checkpoints to Ray.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
import ray.util
import torch
import torch.distributed as dist

from lmu_dist import config as configuration
from lmu_dist import records
from lmu_dist.config import Folder
from lmu_dist.data.batches import Rows, row_indices
from lmu_dist.launch.cell import FORKS, Cell
from lmu_dist.launch.record import Outcome, record_of_cell, record_path, tell_result, write_record
from lmu_dist.models import accounting
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.mixers.lmu.mixer import operator
from lmu_dist.records import EvalMetrics
from lmu_dist.storage import fetch_folder
from lmu_dist.toolchain import prepare_builds
from lmu_dist.train import checkpoint
from lmu_dist.train.divergence import diverged, running_mean
from lmu_dist.train.schedule import learning_rate, phase


@dataclass(frozen=True)
class Job:
    """What a group of workers is given."""

    cells: tuple[Cell, ...]  # of one trunk, fewest tokens first
    recorder: Any  # actor handle
    reports: bool  # whether Ray Tune is told of evaluations


class Start(NamedTuple):
    """Where a cell begins: a checkpoint to load (none: at step 0), whether it is the cell's own, the state it holds, and a word
    that no other attempt uses."""

    folder: Folder | None
    own: bool
    state: checkpoint.Meta
    attempt: str


def train_worker(arguments: dict[str, Job]) -> None:
    """Trains the cells of a job to their ends, each from its newest whole checkpoint. Runs on every worker; collective."""
    job = arguments["job"]
    prepare_builds()
    # Imported here since the driver, which imports this file too, has no use for DeepSpeed's four seconds.
    from lmu_dist.train.engine import Engine

    first, rank = job.cells[0], ray.train.get_context().get_world_rank()
    device = ray.train.torch.get_device()
    torch.set_num_threads(first.config.cluster.cpus_per_worker)
    engine: Engine | None = None
    wild: Outcome | None = None  # of a cell that diverged before its decay, as all that follow in the trunk would
    for index, cell in enumerate(job.cells):
        if _agree(lambda cell=cell: record_path(cell).exists(), rank):
            continue  # ended before the workers were started again
        start = Start(*_agree(lambda cell=cell: _start(cell), rank))
        if engine is not None and start.folder is None:
            engine.close()
            engine = None
        if engine is None:
            train = cell.config.train
            engine = Engine(LanguageModel(cell.shape, cell.config.seed, train.lmu_form), train, cell.config.cluster, device)
        if start.folder is not None:
            _load(engine, start)
        run = _Run(job, index, engine, rank, start.attempt)
        if wild is not None and not start.own:
            # This cell would take the very same steps to the same end.
            outcome = replace(wild, state=_of_cell(wild.state, cell, fork_step=wild.state.step))
        else:
            outcome = run.train(replace(start.state, world_size=dist.get_world_size()))
        if outcome.status == records.DIVERGED:
            # A step that was given up has left gradients, and a count of micro-batches, that loading does not reset.
            engine.close()
            engine = None
            wild = outcome if outcome.state.step < cell.config.train.decay_start else wild
        run.end(outcome)


class _Run:
    """One cell on this rank."""

    def __init__(self, job: Job, index: int, engine: Any, rank: int, attempt: str) -> None:
        self.job, self.index, self.cell = job, index, job.cells[index]
        self.engine, self.rank, self.attempt = engine, rank, attempt
        self.world_size = dist.get_world_size()
        corpus, sequence_tokens = self.cell.corpus, self.cell.config.train.sequence_tokens
        self.rows: Rows = corpus.rows("train", sequence_tokens)
        self.held_out: Rows = corpus.rows("validation", sequence_tokens)
        self.bytes_per_token = corpus.manifest.bytes_per_token("validation")

    def train(self, state: checkpoint.Meta) -> Outcome:
        """The steps from `state` to the end of the cell, or of its hopes."""
        from lmu_dist.train.engine import matmul_peak
        from lmu_dist.train.loop import steps

        config, engine = self.cell.config, self.engine
        train, cluster = config.train, config.cluster
        told = {"lmu.status": records.RUNNING, "lmu.n_workers": self.world_size, "lmu.zero_stage": cluster.zero_stage}
        if rows := self.cell.shape.reduced_order:
            told["lmu.operator"] = operator(train.lmu_form, engine.dtype, engine.device, rows)
        self.tell("attempt", told)
        peak = engine.sum_over_ranks(torch.tensor(matmul_peak(train.precision, engine.device))).item()
        flops = accounting.flops(self.cell.shape).training
        n_rows, seed = len(self.rows), config.seed
        stream = steps(
            engine,
            lambda step: self.rows.batch(row_indices(n_rows, seed, step, train.batch_rows, self.rank, self.world_size)),
            lambda step: learning_rate(train, step, state.val_losses),
            state.step,
            train.n_steps,
            train.batch_tokens,
        )
        for metrics in stream:
            self.tell("metrics", metrics.step, metrics.values(train.batch_tokens, flops, peak))
            seconds = state.training_seconds + metrics.step_seconds
            mean = running_mean(state.mean_loss_nats, metrics.loss_nats if metrics.finite else math.nan)
            state = replace(state, train_loss_nats=metrics.loss_nats, training_seconds=seconds)
            if rule := diverged(train, mean, state.best_mean_loss_nats):
                return Outcome(records.DIVERGED, "undecayed", rule, state)
            best = min(mean, state.best_mean_loss_nats)
            state = replace(state, step=metrics.step + 1, mean_loss_nats=mean, best_mean_loss_nats=best)
            last = state.step == train.n_steps
            fork_now = train.schedule == "wsd" and state.step == train.decay_start
            evaluate_now = state.step % train.eval_every_steps == 0 or last
            save_now = state.step % cluster.checkpoint_every_steps == 0 or last
            saving = evaluate_now or save_now or fork_now
            if saving and not math.isfinite(self.validate(state.step, train.sequence_tokens).loss_nats):
                # The step was finite and the weights it left are not usable: they must not become the last good checkpoint.
                return Outcome(records.DIVERGED, "undecayed", "non-finite loss", state)
            if evaluate_now:
                state = self.evaluate(state)
            if save_now:
                # Everything up to here is on the recorder's disk before the checkpoint that makes it history is.
                if (told := self.tell("tags", {"lmu.checkpoint_step": state.step})) is not None:
                    ray.get(told)
                self.save(state, self.cell.folder)
            if fork_now and not self.is_forked(state):
                self.save(state, self.cell.trunk_folder / FORKS)
        return Outcome(records.COMPLETE, phase(train, state.step), "", state)

    def is_forked(self, state: checkpoint.Meta) -> bool:
        """Whether the trunk has a fork at this step already, from before an interruption."""
        forks = self.cell.trunk_folder / FORKS
        _, found = _agree(lambda: checkpoint.newest_fork(forks, state.step, state.zero_stage), self.rank)
        return found is not None and found.step == state.step

    def evaluate(self, state: checkpoint.Meta) -> checkpoint.Meta:
        """A whole validation, told and remembered."""
        evaluation = self.validate(state.step, self.cell.config.train.eval_tokens)
        memory = {records.WORKER_BYTES: self.engine.max_over_ranks(self.engine.peak_bytes())}
        self.tell("metrics", state.step - 1, evaluation.values() | memory)
        state = replace(state, val_losses=[*state.val_losses, evaluation.loss_nats], evaluation=asdict(evaluation))
        if self.job.reports:
            tokens = state.step * self.cell.config.train.batch_tokens
            ray.train.report({"tokens": tokens, "val_loss_nats": evaluation.loss_nats, "state": json.dumps(asdict(state))})
        return state

    def validate(self, step: int, n_tokens: int) -> EvalMetrics:
        """Loss over the first `n_tokens` of the validation split."""
        from lmu_dist.train.evaluate import evaluate

        n_rows = min(len(self.held_out), max(1, n_tokens // self.cell.config.train.sequence_tokens))
        return evaluate(self.engine, self.held_out, n_rows, self.rank, self.world_size, step, self.bytes_per_token)

    def save(self, state: checkpoint.Meta, to: Folder) -> None:
        """Writes this rank's files to a folder of its own; Ray merges those of all ranks in storage."""
        name = checkpoint.folder_name(state.step, state.world_size, self.attempt)
        with tempfile.TemporaryDirectory() as folder:
            self.engine.save(Path(folder))
            checkpoint.seal(Path(folder), state, self.rank, self.engine.weights())
            ray.train.report(
                {"step": state.step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"{to.name}/{name}",  # below the trunk's folder
            )
        dist.barrier()  # all ranks' files are in their place
        if self.rank == 0 and to == self.cell.folder:
            checkpoint.prune(to, self.cell.config.cluster.keep_checkpoints)

    def end(self, outcome: Outcome) -> None:
        """Tells how it ended, and leaves the record in the cell's folder once all of it is on the recorder's disk."""
        if self.rank:
            return
        record = record_of_cell(self.cell, outcome)
        tell_result(record, outcome.evaluation, self.tell)
        told = self.tell("end", outcome.status)
        assert told is not None
        ray.get(told)
        write_record(self.cell, record)

    def tell(self, kind: str, *arguments: Any) -> ray.ObjectRef | None:
        """Hands something to the recorder, from rank 0, without waiting."""
        return self.job.recorder.tell.remote(self.index, kind, *arguments) if self.rank == 0 else None


def _load(engine: Any, start: Start) -> None:
    """Loads a checkpoint. What must be fetched, or converted for another number of workers, is so once on every node."""
    from lmu_dist.train.engine import to_universal

    assert start.folder is not None
    # By address, as Ray counts local ranks: workers at one address share a disk, and nodes at several may as well.
    name = f"lmu-dist-{start.attempt}-{ray.util.get_node_ip_address()}"
    scratch, first = Path(tempfile.gettempdir()) / name, os.environ["LOCAL_RANK"] == "0"
    convert = start.state.zero_stage > 0 and start.state.world_size != dist.get_world_size()
    here = start.folder if isinstance(start.folder, Path) else scratch / "fetched"
    try:
        if first and here != start.folder:
            fetch_folder(start.folder, here)
        if first and convert:
            to_universal(here, scratch / "universal")
        dist.barrier()
        engine.load(scratch / "universal" if convert else here, convert)
        dist.barrier()
    finally:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)


def _start(cell: Cell) -> Start:
    """From the cell's own newest whole checkpoint, else from the trunk's latest fork it can use, else from the beginning."""
    attempt, cluster = f"{time.time_ns():x}", cell.config.cluster
    folder, state, _ = checkpoint.newest_intact(cell.folder)
    if state is not None:
        return Start(folder, True, state, attempt)
    if cell.config.train.schedule == "wsd":
        forks, stable = cell.trunk_folder / FORKS, cell.config.train.decay_start
        folder, state = checkpoint.newest_fork(forks, stable, cluster.zero_stage)
        if state is not None and state.key == cell.key:
            return Start(folder, True, state, attempt)
        if state is not None:
            return Start(folder, False, _of_cell(state, cell, fork_step=state.step), attempt)
    manifest = cell.corpus.manifest
    fresh = checkpoint.Meta(
        step=0,
        key=cell.key,
        world_size=dist.get_world_size(),
        zero_stage=cluster.zero_stage,
        data_digest=manifest.data_digest,
        tokenizer_digest=manifest.tokenizer_digest,
        code_digest=cell.code_digest,
        config=configuration.to_dict(cell.config),
        shape=asdict(cell.shape),
    )
    return Start(None, False, fresh, attempt)


def _of_cell(state: checkpoint.Meta, cell: Cell, fork_step: int) -> checkpoint.Meta:
    """A state of one cell of a trunk as the state of another."""
    return replace(state, key=cell.key, config=configuration.to_dict(cell.config), fork_step=fork_step)


def _agree(make: Callable[[], Any], rank: int) -> Any:
    """What rank 0 makes, on every rank; its error too, so that no rank waits for another for ever."""
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except configuration.ConfigError as e:
            box[1] = str(e)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise configuration.ConfigError(box[1])
    return box[0]
