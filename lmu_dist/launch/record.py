"""What is logged of a run besides its metrics per step: its constants at the start, its RunRecord at the end.

Takes a Cell and an Outcome, returns a RunRecord, and logs both through a RunLogger. Called by worker, run_group and claim.
MLflow is not asked.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lmu_dist import config as configuration
from lmu_dist import records
from lmu_dist.config import ConfigError, Folder
from lmu_dist.launch.cell import Cell, git_commit
from lmu_dist.records import EvalMetrics, RunRecord
from lmu_dist.storage import write_atomic
from lmu_dist.tracking.run_logger import RunLogger
from lmu_dist.train import VERSION, checkpoint

RECORD = "record.json"
FINAL_STATUSES = (records.COMPLETE, records.DIVERGED)  # outside of a search, a run that it stopped early is continued


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and its state at that step."""

    status: str
    phase: str
    stop_rule: str
    state: checkpoint.Meta

    @property
    def evaluation(self) -> EvalMetrics | None:
        """The last validation; None if there was none."""
        if not (saved := self.state.evaluation):
            return None
        # JSON made a list of the tuple.
        return EvalMetrics(
            **records.known_fields(EvalMetrics, saved | {"position_loss_nats": tuple(saved["position_loss_nats"])})
        )


@dataclass(frozen=True)
class FinishedRun:
    """A cell that has ended, with its record and its MLflow run."""

    cell: Cell
    record: RunRecord
    run_id: str  # "" if MLflow has not answered since the run started
    tracking_uri: str
    already_done: bool
    notes: tuple[str, ...]  # warnings for the user: damaged checkpoints that were skipped, a log that is not uploaded yet


def notes(skipped: Sequence[str], not_uploaded: str, of_log: Sequence[str] = ()) -> tuple[str, ...]:
    """The warnings about a run: damaged checkpoints that were skipped, why its log is not uploaded completely, and others."""
    note = f"MLflow does not have all metrics of this run yet ({not_uploaded}); start the same command again to upload the rest"
    return (*skipped, *([note] if not_uploaded else []), *of_log)


def log_start(cell: Cell, logger: RunLogger) -> None:
    """Logs what is known before the first step: params, tags and the dataset."""
    config, manifest = configuration.to_dict(cell.config), cell.corpus.manifest
    constants = configuration.flatten({k: config[k] for k in ("data", "model", "train")})
    for key in configuration.PASSIVE_TRAIN_KEYS:  # MLflow refuses a param that changes, and these may when a run resumes
        del constants[f"train.{key}"]
    # What is not set has no param: each makes every reading of the run slower. But a family's option may be set to None.
    constants = {key: value for key, value in constants.items() if value is not None or key.startswith("model.")}
    logger.start_run()
    logger.log_params(constants | record_of_cell(cell, None).columns("params"))
    logger.set_tags({"lmu.status": records.WAITING, "lmu.git_commit": git_commit(), "lmu.folder": str(cell.folder)})
    logger.set_tags({"lmu.retry_of": cell.retry_of, "lmu.family_appearance": json.dumps(asdict(cell.appearance))})
    logger.log_dataset(manifest.source[:500], manifest.data_digest, str(cell.corpus.folder), {"splits": manifest.splits})


def log_result(record: RunRecord, evaluation: EvalMetrics | None, logger: RunLogger) -> None:
    """Logs the record, and the validation loss by position as a curve and as a table."""
    logger.log_metrics(record.steps, record.columns("metrics"))
    if evaluation:
        curve = evaluation.position_loss_nats
        logger.log_curve(records.POSITION_LOSS, curve)
        logger.log_table("position_loss", {"position": list(range(1, len(curve) + 1)), "loss_nats": list(curve)})
    logger.set_tags(record.columns("tags"))


def record_of_cell(cell: Cell, outcome: Outcome | None) -> RunRecord:
    """The RunRecord of a run. Without an outcome: of a run that is about to start, with NaN for its losses."""
    train = cell.config.train
    counts, flops = cell.parameters, cell.flops
    evaluation = outcome.evaluation if outcome else None
    nan = float("nan")
    return RunRecord(
        family=cell.shape.family,
        n_params=counts.non_embedding,
        n_params_with_head=counts.with_head,
        n_params_total=counts.total,
        d_model=cell.shape.d_model,
        n_blocks=cell.shape.n_blocks,
        widths=json.dumps(dict(cell.shape.widths), sort_keys=True),
        sequence_tokens=train.sequence_tokens,
        vocab_tokens=cell.shape.vocab_tokens,
        planned_tokens=train.n_steps * train.batch_tokens,
        planned_steps=train.n_steps,
        batch_tokens=train.batch_tokens,
        learning_rate=train.peak_rate,
        schedule=train.schedule,
        precision=train.precision,
        gradient_precision=train.gradient_precision if train.precision == "bf16" else "",
        seed=cell.config.seed,
        validation_rows=cell.validation_rows,
        unique_tokens=cell.corpus.manifest.unique_tokens("train", train.sequence_tokens),
        training_flops_per_token=flops.training,
        training_flops_per_token_kaplan=flops.training_kaplan,
        data_digest=cell.corpus.manifest.data_digest,
        code_digest=cell.code_digest,
        family_version=cell.family_version,
        train_version=VERSION,
        schema_version=records.SCHEMA_VERSION,
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
    """The path of record.json. The cell has ended if and only if this file exists."""
    return cell.folder / RECORD


def read_record(cell: Cell) -> RunRecord:
    """Reads the record of a cell that has ended. Raises ConfigError if the file is damaged."""
    try:
        return RunRecord.from_json(json.loads(record_path(cell).read_text()))
    except (ValueError, TypeError, AttributeError) as e:
        path = record_path(cell)
        raise ConfigError(f"{path} is damaged; delete it, and the run goes on from its newest checkpoint") from e


def write_record(cell: Cell, record: RunRecord) -> None:
    """Writes record.json, which marks the cell as ended. Call this after the metrics were logged."""
    write_atomic(record_path(cell), json.dumps(record.to_json(), indent=1).encode())
