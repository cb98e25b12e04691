"""What runs inside a Ray Train worker: wires data, model, engine and loop together, then listens to the loop.

Started by launch/trainer with a Job; tells the recorder; hands checkpoints to Ray; returns an Outcome from rank 0.
"""

import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from lmu_dist import config as configuration
from lmu_dist import records
from lmu_dist.data.batches import row_indices
from lmu_dist.data.corpus import Corpus, open_corpus
from lmu_dist.models import accounting
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.shape import Shape
from lmu_dist.records import EvalMetrics
from lmu_dist.train import checkpoint
from lmu_dist.train.schedule import learning_rate, phase


@dataclass(frozen=True)
class Job:
    """What a worker is given: plain values only, since it travels."""

    config: dict[str, Any]
    shape: dict[str, Any]
    corpus: str
    folder: str
    key: str
    code_digest: str
    recorder: Any  # actor handle


@dataclass(frozen=True)
class Outcome:
    """How a run ended, for the RunRecord, and where it stood then."""

    status: str
    phase: str
    stop_rule: str
    state: checkpoint.Meta

    @property
    def evaluation(self) -> EvalMetrics | None:
        """The last validation."""
        if not (saved := self.state.evaluation):
            return None
        values: dict[str, Any] = saved | {"position_loss_nats": tuple(saved["position_loss_nats"])}  # a list, once in JSON
        return EvalMetrics(**values)


def train_worker(arguments: dict[str, Job]) -> Outcome:
    """Trains one cell to its end from the newest whole checkpoint. Runs on every worker; collective."""
    job = arguments["job"]
    # DeepSpeed builds its CPU collectives with the ninja that stands beside this Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # Imported here since the driver, which imports this file too, has no use for DeepSpeed's four seconds.
    from lmu_dist.train.engine import Engine, matmul_peak
    from lmu_dist.train.evaluate import evaluate
    from lmu_dist.train.loop import steps

    config = configuration.parse(job.config)
    train, cluster = config.train, config.cluster
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(cluster.cpus_per_worker)

    corpus, shape = open_corpus(Path(job.corpus)), Shape(**job.shape)
    rows, held_out = (corpus.rows(split, train.sequence_tokens) for split in ("train", "validation"))
    engine = Engine(LanguageModel(shape, config.seed), train, cluster, device)
    [folder, state, attempt] = _agree(lambda: _start(job, world_size, corpus), rank)
    if folder is not None:
        engine.load(folder)

    def tell(kind: str, *arguments: Any) -> ray.ObjectRef | None:
        return job.recorder.tell.remote(kind, *arguments) if rank == 0 else None

    def validate(step: int, n_tokens: int) -> EvalMetrics:
        n_rows = min(len(held_out), max(1, n_tokens // train.sequence_tokens))
        bytes_per_token = corpus.manifest.bytes_per_token("validation")
        return evaluate(engine, held_out, n_rows, rank, world_size, step, bytes_per_token)

    tell("attempt", {"lmu.n_workers": world_size, "lmu.zero_stage": cluster.zero_stage})
    peak = engine.sum_over_ranks(torch.tensor(matmul_peak(train.precision, device))).item()
    flops = accounting.flops(shape).training
    stream = steps(
        engine,
        lambda step: rows.batch(row_indices(len(rows), config.seed, step, train.batch_rows, rank, world_size)),
        lambda step: learning_rate(train, step, state.val_losses),
        state.step,
        train.n_steps,
        train.batch_tokens,
    )
    for metrics in stream:
        tell("metrics", metrics.step, metrics.values(train.batch_tokens, flops, peak))
        seconds = state.training_seconds + metrics.step_seconds
        state = replace(state, train_loss_nats=metrics.loss_nats, training_seconds=seconds)
        if not metrics.finite:
            return Outcome(records.DIVERGED, "undecayed", "non-finite loss", state)
        state = replace(state, step=metrics.step + 1)
        last = state.step == train.n_steps
        evaluate_now = state.step % train.eval_every_steps == 0 or last
        save_now = state.step % cluster.checkpoint_every_steps == 0 or last
        if (evaluate_now or save_now) and not math.isfinite(validate(state.step, train.sequence_tokens).loss_nats):
            # The step was finite and the weights it left are not usable: they must not become the last good checkpoint.
            return Outcome(records.DIVERGED, "undecayed", "non-finite loss", state)
        if evaluate_now:
            evaluation = validate(state.step, train.eval_tokens)
            memory = {records.WORKER_BYTES: engine.max_over_ranks(engine.peak_bytes())}
            tell("metrics", metrics.step, evaluation.values() | memory)
            val_losses = [*state.val_losses, evaluation.loss_nats]
            state = replace(state, val_losses=val_losses, evaluation=asdict(evaluation))
        if save_now:
            # Everything up to here is on the recorder's disk before the checkpoint that makes it history is.
            if (told := tell("tags", {"lmu.checkpoint_step": state.step})) is not None:
                ray.get(told)
            _checkpoint(engine, state, rank, attempt)
    return Outcome(records.COMPLETE, phase(train, state.step), "", state)


def _start(job: Job, world_size: int, corpus: Corpus) -> tuple[Path | None, checkpoint.Meta, str]:
    """The checkpoint to go on from (none at first), where it stood, and a word that no other attempt uses."""
    folder, state, _ = checkpoint.newest_intact(Path(job.folder))
    fresh = checkpoint.Meta(
        step=0,
        key=job.key,
        world_size=world_size,
        zero_stage=job.config["cluster"]["zero_stage"],
        data_digest=corpus.manifest.data_digest,
        tokenizer_digest=corpus.manifest.tokenizer_digest,
        code_digest=job.code_digest,
        config=job.config,
        shape=job.shape,
    )
    return folder, state or fresh, f"{time.time_ns():x}"


def _agree(make: Any, rank: int) -> Any:
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


def _checkpoint(engine: Any, meta: checkpoint.Meta, rank: int, attempt: str) -> None:
    """Writes this rank's files to a folder of its own; Ray merges those of all ranks in storage."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save(Path(folder))
        checkpoint.seal(Path(folder), meta, rank, engine.weights())
        ray.train.report(
            {"step": meta.step, "train_loss_nats": meta.train_loss_nats},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=checkpoint.folder_name(meta.step, meta.world_size, attempt),
        )
