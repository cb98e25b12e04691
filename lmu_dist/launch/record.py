"""What is told of a run: how it ended in, RunRecord out, and the telling of it through the recorder."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lmu_dist import config as configuration
from lmu_dist import records
from lmu_dist.config import Folder
from lmu_dist.launch.cell import Cell, git_commit
from lmu_dist.models import accounting
from lmu_dist.records import EvalMetrics, RunRecord
from lmu_dist.storage import write_whole
from lmu_dist.train import checkpoint

Tell = Callable[..., Any]  # a method of Spool by name, and its arguments


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and where it stood then."""

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


def tell_start(cell: Cell, tell: Tell) -> None:
    """What is known before the first step."""
    config, manifest = configuration.to_dict(cell.config), cell.corpus.manifest
    constants = configuration.flatten({k: config[k] for k in ("data", "model", "train")})
    tell("start")
    tell("params", constants | record_of_cell(cell, None).columns("params"))
    tell("tags", {"lmu.status": records.WAITING, "lmu.git_commit": git_commit(), "lmu.folder": str(cell.folder)})
    tell("tags", {"lmu.retry_of": cell.retry_of})
    tell("dataset", manifest.source[:500], manifest.data_digest, str(cell.corpus.folder), {"splits": manifest.splits})


def tell_result(record: RunRecord, evaluation: EvalMetrics | None, tell: Tell) -> None:
    """The record, and the loss by position as curve and as table."""
    tell("metrics", record.steps, record.columns("metrics"))
    if evaluation:
        curve = evaluation.position_loss_nats
        positions = list(range(1, len(curve) + 1))
        for position, loss in zip(positions, curve, strict=True):
            tell("metrics", position, {records.POSITION_LOSS: loss})
        tell("table", "position_loss", {"position": positions, "loss_nats": list(curve)})
    tell("tags", record.columns("tags"))


def record_of_cell(cell: Cell, outcome: Outcome | None) -> RunRecord:
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
        fork_step=outcome.state.fork_step if outcome else 0,
        retry_of=cell.retry_of,
    )


def record_path(cell: Cell) -> Folder:
    """The record of a cell that has ended: its being there is what says so."""
    return cell.folder / "record.json"


def read_record(cell: Cell) -> RunRecord:
    """The record of a cell that ended in its folder."""
    return RunRecord(**json.loads(record_path(cell).read_text()))


def write_record(cell: Cell, record: RunRecord) -> None:
    """Ends a cell. Comes after the telling, so that what ended is told."""
    write_whole(record_path(cell), json.dumps(asdict(record), indent=1).encode())
