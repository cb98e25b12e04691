"""Sections that describe one run: data, model, train, cluster, with the default and the meaning of every key."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from lmu_dist.config.types import STRICT, Count, Family, Natural, Positive, Share


@dataclass(frozen=True, config=STRICT)
class TokenizerConfig:
    """Where the vocabulary comes from: trained on the corpus (bpe), a tokenizer.json (file), or GPT-2's two files."""

    kind: Literal["bpe", "file", "gpt2"] = "bpe"
    vocab_tokens: Count = 4096  # bpe only
    path: str | None = None  # file: tokenizer.json
    vocab_path: str | None = None  # gpt2: encoder.json / vocab.json
    merges_path: str | None = None  # gpt2: vocab.bpe / merges.txt

    @model_validator(mode="after")
    def _complete(self) -> "TokenizerConfig":
        if self.kind == "file" and not self.path:
            raise ValueError("kind: file needs path, a tokenizer.json")
        if self.kind == "gpt2" and not (self.vocab_path and self.merges_path):
            raise ValueError("kind: gpt2 needs vocab_path and merges_path, GPT-2's encoder.json and vocab.bpe")
        if self.kind == "bpe" and not 257 <= self.vocab_tokens <= 2**31:
            raise ValueError("vocab_tokens must be at least 257: 256 bytes and the end-of-text token")
        return self


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """What the corpus is. Everything here, and nothing else, decides what `prepare` writes."""

    source: Literal["python-stdlib", "files", "huggingface"] = "python-stdlib"
    files: tuple[str, ...] = ()  # globs: .txt .jsonl .jsonl.gz .jsonl.zst .parquet, .tar of .jsonl.zst
    dataset: str | None = None  # huggingface: name or local path
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_field: str = "text"
    max_bad_share: Share = 0.05  # of documents (or files) that cannot be read, above which preparing fails
    tokenizer: TokenizerConfig = TokenizerConfig()

    @model_validator(mode="after")
    def _complete(self) -> "DataConfig":
        if self.source == "files" and not self.files:
            raise ValueError('source: files needs files, a list of globs such as ["corpus/*.jsonl.zst"]')
        if self.source == "huggingface" and not self.dataset:
            raise ValueError("source: huggingface needs dataset, a name on the hub or a local path")
        return self


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """What is trained: a family and its size. None leaves a width to the rule in models/sizing."""

    family: Family = "lmu"
    n_params: Count = 56_000  # non-embedding N, met within 2 %
    n_blocks: Count = 2
    order: Count | None = None
    reduced_order: Count | None = None
    theta_tokens: Count | None = None


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How it is trained. Together with the model, the seed and the data this decides every loss of the run."""

    tokens: Count = 2_500_000  # rounded up to whole batches
    sequence_tokens: Count = 256
    batch_tokens: Count = 2048  # global, whatever the number of workers
    learning_rate: Positive = 1e-2
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_tokens: Natural = 125_000
    decay_share: Share = 0.2  # wsd: last part of the run that decays to zero
    plateau_patience: Natural = 0  # evaluations without improvement before the rate is reduced; 0: never
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    divergence_factor: Annotated[float, Field(gt=1)] = 2.0  # running mean of the loss over its best, above which a run ends
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # decoupled (AdamW)
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"
    lmu_form: Literal["recurrent", "fft", "chunked", "fused"] | None = None  # None: what is fastest there
    eval_every_tokens: Count = 500_000
    eval_tokens: Count = 262_144  # at most this much of the validation split, from its start

    @property
    def batch_rows(self) -> int:
        """Rows of the global batch."""
        return self.batch_tokens // self.sequence_tokens

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return -(-self.warmup_tokens // self.batch_tokens)

    @property
    def decay_start(self) -> int:
        """First step of the decay of `wsd`: up to it, runs that differ only in their tokens are one and the same."""
        return self.n_steps - max(1, round(self.decay_share * self.n_steps))

    @property
    def eval_every_steps(self) -> int:
        """Steps between evaluations."""
        return max(1, self.eval_every_tokens // self.batch_tokens)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.batch_tokens % self.sequence_tokens:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of sequence_tokens ({self.sequence_tokens})"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    """On what it runs. Changes how fast and how safely, not what is computed (to the order of float sums)."""

    address: str | None = None  # of a Ray cluster; None: $RAY_ADDRESS, else a local one for this command
    n_workers: Count = 2
    min_workers: Count | None = None  # go on with as few while there is no room for all; None: wait for room
    wait_seconds: Natural = 0  # for a cluster that scales itself to make room, before a run that has none is refused
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"  # workers on few nodes, on many, or on a node each
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    micro_batch_rows: Count | None = None  # rows of one forward pass; None: the worker's whole share
    max_failures: Natural = 3  # restarts after a lost worker
    checkpoint_every_steps: Count = 100
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2

    @model_validator(mode="after")
    def _consistent(self) -> "ClusterConfig":
        if self.min_workers and self.min_workers > self.n_workers:
            raise ValueError(f"min_workers ({self.min_workers}) must not be more than n_workers ({self.n_workers})")
        return self
