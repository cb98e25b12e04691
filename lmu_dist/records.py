"""What crosses between rooms about a run: StepMetrics, EvalMetrics, RunRecord, and the names and units of metrics.

The loop yields the first, evaluation makes the second, launch/record fills the third; tracking writes them, the
analysis reads them back. A run's constants are MLflow params, its results metrics, what may change tags.
"""

import math
from collections.abc import Mapping
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
# Its MLflow step is the position in the row, 1 .. n: the paper's figure 4 as a curve.
POSITION_LOSS = "position/loss_nats"

# How a run ended. Only `complete` is a result; the others say why not.
WAITING, RUNNING, COMPLETE, STOPPED_EARLY, DIVERGED = "waiting", "running", "complete", "stopped_early", "diverged"
FAILED, INTERRUPTED = "failed", "interrupted"
ENDED = (COMPLETE, STOPPED_EARLY, DIVERGED)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: its number (0 is the first), tokens seen after it, mean loss of the global batch in nats."""

    step: int
    tokens: int
    loss_nats: float
    grad_norm: float
    learning_rate: float
    step_seconds: float

    @property
    def finite(self) -> bool:
        """False when the run has diverged."""
        return math.isfinite(self.loss_nats) and math.isfinite(self.grad_norm)

    def values(self, step_tokens: int, training_flops_per_token: float, peak_flops_per_second: float) -> dict[str, float]:
        """The step as metrics. Peak is that of all workers together."""
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
    """Validation after `step` steps. The standard error is over rows, which are far less correlated than tokens."""

    step: int
    loss_nats: float
    standard_error_nats: float
    bits_per_byte: float
    n_rows: int
    position_loss_nats: tuple[float, ...]  # mean loss at position 1 .. n of a row

    def values(self) -> dict[str, float]:
        """The evaluation as metrics."""
        return {VAL_LOSS: self.loss_nats, VAL_ERROR: self.standard_error_nats, BITS_PER_BYTE: self.bits_per_byte}


@dataclass(frozen=True)
class Appearance:
    """How reports show a family: its title, its colour ("#rrggbb") on light and on dark pages, matplotlib's marker and line.

    Empty: what is free.
    """

    title: str
    colour: str = ""
    colour_dark: str = ""
    marker: str = ""
    line: str = "-"


SCHEMA_VERSION = 2  # of RunRecord; 1 had a digest of all code in place of versions
Value = str | int | float


def _param(default: Value = MISSING) -> Any:  # pyright: ignore[reportArgumentType]
    return field(default=default, metadata={"kind": "params"})


def _metric(default: Value = math.nan) -> Any:
    return field(default=default, metadata={"kind": "metrics"})


def _tag(default: Value = "") -> Any:
    return field(default=default, metadata={"kind": "tags"})


@dataclass(frozen=True)
class RunRecord:
    """One flat row per run: all that the scaling analysis needs, counted once and never recounted.

    Records outlive the code that wrote them: a field that is added has a default, which is what older records are read with;
    fields of later versions are kept in `unknown` and written again, and nothing else looks at them.
    """

    family: str = _param()
    n_params: int = _param()  # non-embedding N (Kaplan)
    n_params_with_head: int = _param(0)  # N with the tied head (Porian)
    n_params_total: int = _param(0)
    d_model: int = _param(0)
    n_blocks: int = _param(0)
    sequence_tokens: int = _param(0)
    vocab_tokens: int = _param(0)
    planned_tokens: int = _param(0)
    planned_steps: int = _param(0)
    batch_tokens: int = _param(0)
    learning_rate: float = _param(math.nan)
    schedule: str = _param("")
    precision: str = _param("fp32")
    seed: int = _param(0)
    training_flops_per_token: float = _param(math.nan)  # every matrix product and FFT, head included
    training_flops_per_token_kaplan: float = _param(math.nan)  # 6N
    data_digest: str = _param("")
    code_digest: str = _param("")  # of the sources; decided in schema 1 which runs may meet in a fit
    family_version: str = _param("")  # a number, or the digest of a user's file
    train_version: int = _param(0)
    schema_version: int = _param(1)
    tokens: int = _metric(0)  # trained on
    steps: int = _metric(0)
    train_loss_nats: float = _metric()  # of the last step
    val_loss_nats: float = _metric()
    val_loss_standard_error_nats: float = _metric()
    val_bits_per_byte: float = _metric()
    training_seconds: float = _metric(0.0)  # sum over steps, evaluation and checkpoints left out
    key: str = _tag()
    status: str = _tag()
    phase: str = _tag("undecayed")  # decayed | undecayed: where the schedule stood at the end
    stop_rule: str = _tag()  # empty unless a rule ended the run
    fork_step: int = _tag(0)  # steps before this one were another run's of the same trunk, whose history has them; 0: none
    retry_of: str = _tag()  # key of the run that diverged at twice the learning rate; empty for a first try
    unknown: Mapping[str, Any] = field(default_factory=dict, metadata={"kind": "unknown"})

    @property
    def versions(self) -> tuple[str, str]:
        """What made it: (version of the family, version of the training). Losses of two versions never meet in a fit."""
        return self.family_version or self.code_digest[:12], str(self.train_version or self.code_digest[:12])

    def columns(self, kind: str) -> dict[str, Any]:
        """Fields of one kind, `params`, `metrics` or `tags`, by their MLflow name."""
        return {_name(f): getattr(self, f.name) for f in fields(self) if f.metadata["kind"] == kind}

    @classmethod
    def from_columns(cls, params: dict[str, str], metrics: dict[str, float], tags: dict[str, str]) -> "RunRecord":
        """Reads back what `columns` gave, from MLflow's text. Raises KeyError if the run has no record, as before its end."""
        source: dict[str, dict[str, Any]] = {"params": params, "metrics": metrics, "tags": tags}
        found = dict[str, Any]()
        for f in fields(cls):
            stored = source.get(f.metadata["kind"], {})
            if _name(f) in stored:
                found[f.name] = f.type(stored[_name(f)])  # pyright: ignore[reportCallIssue]
        if missing := {"family", "n_params", "tokens", "val_loss_nats", "key", "phase"} - set(found):
            raise KeyError(", ".join(sorted(missing)))
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """One flat dictionary; `from_json` gives the record back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"} | dict(self.unknown)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "RunRecord":
        """Reads a record of any version."""
        names = {f.name for f in fields(cls)} - {"unknown"}
        return cls(**known_fields(cls, stored), unknown={name: value for name, value in stored.items() if name not in names})


def known_fields(cls: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass has fields for, of a dictionary that another version may have stored."""
    return {f.name: stored[f.name] for f in fields(cls) if f.name in stored and f.name != "unknown"}


def _name(f: Any) -> str:
    prefix = {"metrics": "final/", "tags": "lmu."}.get(f.metadata["kind"], "")
    return f"{prefix}{f.name}"
