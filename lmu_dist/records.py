"""StepMetrics, EvalMetrics and RunRecord, the data about a run that the packages exchange; names and units of the metrics.

train/loop yields StepMetrics, train/evaluate returns EvalMetrics and launch/record makes the RunRecord. tracking/ writes them
to MLflow, scaling/ reads them. A run's constants are MLflow params, its results are metrics, values that may change are tags.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

# Metric keys of the training history, one point per step (or evaluation); MLflow's step is the optimizer step.
TRAIN_LOSS = "train/loss_nats"
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"
TRAIN_TOKENS = "train/tokens"
TOKENS_PER_SECOND = "speed/tokens_per_second"
MODEL_FLOPS = "speed/model_flops_per_second"
PEAK_SHARE = "speed/share_of_matmul_peak"
WORKER_BYTES = "memory/peak_worker_bytes"
VAL_LOSS = "val/loss_nats"
VAL_ERROR = "val/loss_standard_error_nats"
BITS_PER_BYTE = "val/bits_per_byte"
# Its MLflow step is the position in the row, 1 .. n. The curve corresponds to figure 4 of the LMU paper.
POSITION_LOSS = "position/loss_nats"

# Status of a run. Only a `complete` run is a result.
WAITING, RUNNING, COMPLETE, STOPPED_EARLY, DIVERGED = "waiting", "running", "complete", "stopped_early", "diverged"
FAILED, INTERRUPTED = "failed", "interrupted"
NOT_NEEDED = "not needed"  # of a planned cell, which has no run: its ladder stopped before it
ENDED = (COMPLETE, STOPPED_EARLY, DIVERGED)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: its index (from 0), tokens trained on after it, and the mean loss of the global batch in nats."""

    step: int
    tokens: int
    loss_nats: float
    grad_norm: float
    learning_rate: float
    step_seconds: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite. If not, the run has diverged."""
        return math.isfinite(self.loss_nats) and math.isfinite(self.grad_norm)

    def values(self, step_tokens: int, training_flops_per_token: float, peak_flops_per_second: float) -> dict[str, float]:
        """The step as MLflow metrics. `peak_flops_per_second` is the sum over all workers."""
        per_second = step_tokens / self.step_seconds
        return {
            TRAIN_LOSS: self.loss_nats,
            LEARNING_RATE: self.learning_rate,
            GRAD_NORM: self.grad_norm,
            TRAIN_TOKENS: self.tokens,
            TOKENS_PER_SECOND: per_second,
            MODEL_FLOPS: per_second * training_flops_per_token,
            PEAK_SHARE: per_second * training_flops_per_token / peak_flops_per_second,
        }


@dataclass(frozen=True)
class EvalMetrics:
    """Validation after `step` steps. The standard error is computed over rows, because tokens of a row are correlated."""

    step: int
    loss_nats: float
    standard_error_nats: float
    bits_per_byte: float
    n_rows: int
    position_loss_nats: tuple[float, ...]  # mean loss at position 1 .. n of a row

    def values(self) -> dict[str, float]:
        """The evaluation as MLflow metrics."""
        return {VAL_LOSS: self.loss_nats, VAL_ERROR: self.standard_error_nats, BITS_PER_BYTE: self.bits_per_byte}


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "H", "d", "8")  # of matplotlib
LINES = ("-", "--", "-.", ":")  # of matplotlib


@dataclass(frozen=True)
class Appearance:
    """How reports show a family: title, colour ("#rrggbb") on light and dark pages, matplotlib's marker and line style.

    Empty: the report chooses a colour or marker that no other family has.
    """

    title: str
    colour: str = ""
    colour_dark: str = ""
    marker: str = ""
    line: str = "-"


REPEATED = 1.01  # epochs from which data count as repeated
SCHEMA_VERSION = 2  # of RunRecord; schema 1 had a digest of all code instead of versions
Value = str | int | float


def _param(default: Value = MISSING) -> Any:  # pyright: ignore[reportArgumentType]
    return field(default=default, metadata={"kind": "params"})


def _metric(default: Value = math.nan) -> Any:
    return field(default=default, metadata={"kind": "metrics"})


def _tag(default: Value = "") -> Any:
    return field(default=default, metadata={"kind": "tags"})


@dataclass(frozen=True)
class RunRecord:
    """Result of a run as one flat row, with everything that the scaling analysis needs.

    Records must be readable by later and earlier versions of the code. A new field needs a default, which is used for older
    records. Fields of later versions are kept in `unknown`, written back and otherwise ignored.
    """

    family: str = _param()
    n_params: int = _param()  # non-embedding N (Kaplan)
    n_params_with_head: int = _param(0)  # N with the tied head (Porian)
    n_params_total: int = _param(0)
    d_model: int = _param(0)
    n_blocks: int = _param(0)
    widths: str = _param("")  # the family's own widths, as JSON with sorted keys; "": unknown, in older records
    sequence_tokens: int = _param(0)
    vocab_tokens: int = _param(0)
    planned_tokens: int = _param(0)
    planned_steps: int = _param(0)
    batch_tokens: int = _param(0)
    learning_rate: float = _param(math.nan)
    schedule: str = _param("")
    precision: str = _param("fp32")
    gradient_precision: str = _param("")  # of the sums of bf16 gradients; "" in fp32, and in older records, where it was bf16
    seed: int = _param(0)
    validation_rows: str = _param("")  # "256 of 300", spread evenly; "": all, or in older records the first ones
    unique_tokens: int = _param(0)  # that the train split has; more tokens repeat its rows. 0: unknown, in older records
    training_flops_per_token: float = _param(math.nan)  # matrix products and FFTs, including the head
    training_flops_per_token_kaplan: float = _param(math.nan)  # 6N
    data_digest: str = _param("")
    code_digest: str = _param("")  # digest of the sources; in schema 1 it decided which runs were fitted together
    family_version: str = _param("")  # a number, or the digest of a user's file; schema 1: ""
    train_version: int = _param(0)
    schema_version: int = _param(1)
    tokens: int = _metric(0)  # tokens trained on
    steps: int = _metric(0)
    train_loss_nats: float = _metric()  # loss of the last step
    val_loss_nats: float = _metric()
    val_loss_standard_error_nats: float = _metric()
    val_bits_per_byte: float = _metric()
    training_seconds: float = _metric(0.0)  # sum over steps, without evaluation and checkpoints
    key: str = _tag()
    status: str = _tag()
    phase: str = _tag("undecayed")  # decayed | undecayed: whether the learning rate has decayed at the end
    stop_rule: str = _tag()  # the rule that ended the run; empty if none did
    fork_step: int = _tag(0)  # first step of its own; another run of the trunk has the steps before; 0: none
    retry_of: str = _tag()  # key of the run that diverged at twice the learning rate; empty: no retry
    unknown: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata={"kind": "unknown"})

    @property
    def epochs(self) -> float:
        """How often the run trained on the rows of its data; NaN if their number is unknown, in older records."""
        return self.tokens / self.unique_tokens if self.unique_tokens else math.nan

    @property
    def repeats_data(self) -> bool:
        """Whether the run trained on rows of its data more than once. Such tokens are worth less than new ones."""
        return self.epochs > REPEATED

    @property
    def versions(self) -> tuple[str, str]:
        """(version of the family, version of the training). Runs of different versions are never fitted together."""
        return self.family_version or self.code_digest[:12], str(self.train_version or self.code_digest[:12])

    def columns(self, kind: str) -> dict[str, Any]:
        """Fields of one kind (`params`, `metrics` or `tags`) by MLflow name. Metrics include epochs, for queries."""
        columns = {_name(f): getattr(self, f.name) for f in fields(self) if f.metadata["kind"] == kind}
        return columns | ({"final/epochs": self.epochs} if kind == "metrics" and self.unique_tokens else {})

    @classmethod
    def from_columns(cls, params: dict[str, str], metrics: dict[str, float], tags: dict[str, str]) -> "RunRecord":
        """Makes a record from MLflow's columns. Raises KeyError if the run has no record, for example before it ends."""
        source: dict[str, dict[str, Any]] = {"params": params, "metrics": metrics, "tags": tags}
        values = dict[str, Any]()
        for f in fields(cls):
            stored = source.get(f.metadata["kind"], {})
            if _name(f) in stored:
                with suppress(ValueError):  # a later version may store another type there; then the default holds
                    values[f.name] = f.type(stored[_name(f)])  # pyright: ignore[reportCallIssue]
        if missing := {"family", "n_params", "tokens", "val_loss_nats", "key", "phase"} - set(values):
            raise KeyError(", ".join(sorted(missing)))
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """One flat dictionary. `from_json` restores the record."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"} | dict(self.unknown)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "RunRecord":
        """Restores a record of any schema version."""
        names = {f.name for f in fields(cls)} - {"unknown"}
        return cls(**known_fields(cls, stored), unknown={name: value for name, value in stored.items() if name not in names})


def known_fields(cls: type, stored: Any) -> dict[str, Any]:
    """The entries of a JSON dictionary that are fields of a dataclass; of a list none. Raises TypeError for a number.

    Other versions may have stored other entries.
    """
    return {f.name: stored[f.name] for f in fields(cls) if f.name in stored and f.name != "unknown"}


def _name(f: Any) -> str:
    prefix = {"metrics": "final/", "tags": "lmu."}.get(f.metadata["kind"], "")
    return f"{prefix}{f.name}"
