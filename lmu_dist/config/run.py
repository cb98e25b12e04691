"""Configuration sections of one run: data, model, train, cluster. Comments on the fields give meaning and unit of each key."""

from collections.abc import Mapping
from dataclasses import field
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from lmu_dist.config.types import STRICT, Count, Exponent, Family, Listed, Natural, Positive, Section, Share, Texts

CURVE_POINTS = 1000  # about as many points of a training curve as a plot can show
LEAST_GPU_SHARE = 0.01  # of a worker; Ray counts in steps of 0.0001, and each process takes some memory of the GPU


@dataclass(frozen=True, config=STRICT)
class TokenizerConfig:
    """How text becomes tokens: a BPE tokenizer trained on the corpus, a tokenizer.json, or GPT-2's two vocabulary files."""

    kind: Literal["bpe", "file", "gpt2"] = "bpe"  # bpe: trained on the corpus; file: a tokenizer.json; gpt2: GPT-2's files
    vocab_tokens: Count = 4096  # bpe: size of the vocabulary in tokens, at least 257
    path: str | None = None  # file: path of the tokenizer.json
    vocab_path: str | None = None  # gpt2: path of encoder.json (also published as vocab.json)
    merges_path: str | None = None  # gpt2: path of vocab.bpe (also published as merges.txt)
    end_of_text: str | None = None  # bpe, file: token that is put after every document; None: <|endoftext|>

    @model_validator(mode="after")
    def _complete(self) -> "TokenizerConfig":
        if self.kind == "file" and not self.path:
            raise ValueError("kind: file needs path, a tokenizer.json")
        if self.kind == "gpt2" and not (self.vocab_path and self.merges_path):
            raise ValueError("kind: gpt2 needs vocab_path and merges_path, GPT-2's encoder.json and vocab.bpe")
        if self.end_of_text == "" or (self.kind == "gpt2" and self.end_of_text):
            raise ValueError("end_of_text is the name of a token, for kind bpe or file; GPT-2's is <|endoftext|>")
        if self.kind == "bpe" and not 257 <= self.vocab_tokens <= 2**31:
            raise ValueError("vocab_tokens must be at least 257: 256 bytes and the end-of-text token")
        return self


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """The corpus and its tokenizer. These keys, and no others, decide what `prepare` writes."""

    source: Literal["python-stdlib", "files", "huggingface"] = (
        "python-stdlib"  # where the text comes from; python-stdlib: the source files of Python's standard library
    )
    files: Texts = ()  # files: paths, folders, globs and URLs of .txt .jsonl .ndjson .json .parquet .tar, also compressed
    validation_files: Texts = ()  # files: as `files`; their documents are the validation split; []: 3 % of those of `files`
    dataset: str | None = None  # huggingface: name on the hub, or a local path
    dataset_config: str | None = None  # huggingface: configuration (subset) of the data set; None: its default
    dataset_split: str = "train"  # huggingface: split of the data set to read, or a slice of it such as train[:10%]
    dataset_revision: str | None = None  # huggingface: branch, tag or commit on the hub; None: the newest
    dataset_validation_split: str | None = None  # huggingface: split to validate on; None: 3 % of the documents
    text_field: str = "text"  # field or column that holds the text of a document; meta.text: the field text inside meta
    document_separator: str | None = (
        None  # line that separates documents in .txt, such as "<|endoftext|>", or "" for empty lines; None: no separator
    )
    empty: Literal["drop", "error"] = "drop"  # drop: leave out documents without text; error: count them as unreadable
    max_bad_share: Share = 0.05  # preparing fails if a larger share of the documents, or of the files, cannot be read
    tokenizer: Annotated[TokenizerConfig, Section] = TokenizerConfig()  # how text becomes tokens

    @model_validator(mode="after")
    def _complete(self) -> "DataConfig":
        if self.source == "files" and not self.files:
            raise ValueError('source: files needs files, a list of globs such as ["corpus/*.jsonl.zst"]')
        if self.validation_files and self.source != "files":
            raise ValueError("validation_files needs source: files; of a data set give dataset_validation_split")
        if self.source == "huggingface" and not self.dataset:
            raise ValueError("source: huggingface needs dataset, a name on the hub or a local path")
        if self.dataset_validation_split == self.dataset_split:
            raise ValueError("dataset_validation_split must be another split than dataset_split")
        return self


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Model family and size. The widths follow from n_params by the rules in models/sizing."""

    family: Family = "lmu"  # a built-in family (docs/families.md), one of an installed package, or path/to/file.py:CLASS
    n_params: Count = 56_000  # N, number of non-embedding parameters; the model has it within 2 %
    n_blocks: Count = 2  # number of blocks; for lstm: number of layers
    base_n_params: Count | None = (
        None  # N of the model at which the learning rate was tuned: it then holds at every width (muP); None: only at its own
    )
    # Keys of the family itself, written directly under `model` (model.order) and checked by the family (models/registry).
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Length, optimizer, schedule and evaluation of a run. With model, seed and data these keys determine all its losses."""

    tokens: Count = 2_500_000  # training tokens of the run, rounded up to whole batches
    sequence_tokens: Count = 256  # tokens per row: the context length
    batch_tokens: Count = 2048  # tokens per optimizer step, summed over all workers
    learning_rate: Positive = 1e-2  # peak learning rate, reached after warm-up; with rate_token_exponent that at rate_at_tokens
    rate_token_exponent: Exponent = (
        0.0  # the peak is learning_rate * (tokens / rate_at_tokens)^this; a ladder sets it by ladder.learning_rate
    )
    rate_at_tokens: Count | None = None  # tokens of a run whose peak is learning_rate; needed if rate_token_exponent is not 0
    earlier_tokens: Annotated[
        tuple[Count, ...], Listed
    ] = ()  # wsd: smaller budgets of the ladder; the peak is that of the next budget after each one's branch point
    embedding_rate: Positive = 1.0  # factor of the learning rate of embeddings; the output head is tied to that of the tokens
    matrix_rate: Positive = 1.0  # factor of the learning rate of all other matrices, also of kernels of short convolutions
    vector_rate: Positive = 1.0  # factor of the learning rate of vectors: biases, norms, p of the LMU, A_log, dt_bias and D
    schedule: Literal["cosine", "wsd"] = "cosine"  # after warm-up: cosine to zero, or constant and then linear to zero (wsd)
    warmup_tokens: Natural = 125_000  # tokens of linear warm-up
    decay_share: Share = 0.2  # wsd: share of the run, at its end, in which the learning rate decays to zero
    plateau_patience: Natural = 0  # evaluations without a new best loss before the learning rate is reduced; 0: never
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5  # factor of each such reduction
    divergence_factor: Annotated[float, Field(gt=1)] = 2.0  # a run stops if its running mean loss is this many times its best
    recipe: Family | None = (
        None  # family: settings of each one's paper, or the nearest; or a family whose recipe all take; None: the keys below
    )
    recipe_except: Texts | None = None  # keys of `train` that the recipe does not set; None: those that the configuration sets
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # Adam: decay of the mean of gradients
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999  # Adam: decay of the mean of squared gradients
    eps: Positive = 1e-8  # Adam: added to the root of the mean square
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # decoupled weight decay (AdamW), on matrices only
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # gradients are clipped to this global norm; 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: weights and activations in bfloat16, master weights in float32
    gradient_precision: Literal["fp32", "bf16"] = (
        "fp32"  # type in which gradients are summed over micro-batches and workers, if precision is bf16
    )
    eval_every_tokens: Count = 500_000  # training tokens between evaluations
    eval_tokens: Count = 262_144  # tokens per evaluation, spread evenly over the validation split; all of it if it is shorter
    log_every_steps: Count | None = (
        None  # optimizer steps between two points of the training curves in MLflow; None: a curve has at most some 1,000 points
    )

    @property
    def float32_gradients(self) -> bool:
        """Whether the gradients of bfloat16 weights are summed in float32."""
        return self.precision == "bf16" and self.gradient_precision == "fp32"

    @property
    def batch_rows(self) -> int:
        """Rows (sequences) per global batch."""
        return self.batch_tokens // self.sequence_tokens

    @property
    def n_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def warmup_steps(self) -> int:
        """Number of optimizer steps of linear warm-up."""
        return -(-self.warmup_tokens // self.batch_tokens)

    @property
    def decay_start(self) -> int:
        """First step of the decay of `wsd`. Runs that differ in `tokens` only are identical up to the smallest of these."""
        return self._decay_start_of(self.n_steps)

    def _decay_start_of(self, n_steps: int) -> int:
        return n_steps - max(1, round(self.decay_share * n_steps))

    @property
    def peak_rate(self) -> float:
        """Peak learning rate of a run of `tokens`; of a wsd run with smaller budgets before it, that of its last plateau."""
        return self._peak_rate_of(self.tokens)

    def _peak_rate_of(self, tokens: int) -> float:
        if not self.rate_token_exponent:
            return self.learning_rate
        assert self.rate_at_tokens is not None
        return self.learning_rate * (tokens / self.rate_at_tokens) ** self.rate_token_exponent

    @property
    def plateaus(self) -> tuple[tuple[int, float], ...]:
        """Of `wsd`: (step before which it ends, peak learning rate) of every plateau; the last ends at decay_start."""
        budgets = (*self.earlier_tokens, self.tokens)
        ends = (self._decay_start_of(-(-tokens // self.batch_tokens)) for tokens in budgets)
        return tuple(zip(ends, map(self._peak_rate_of, budgets), strict=True))

    @property
    def eval_every_steps(self) -> int:
        """Number of optimizer steps between evaluations."""
        return max(1, self.eval_every_tokens // self.batch_tokens)

    def is_logged(self, step: int, fork_step: int = 0) -> bool:
        """Whether the training curves have a point at this step, 0 .. n_steps - 1, of a run whose first step is `fork_step`.

        The first step and the last one do. It depends on nothing else, so a run that resumes logs the same steps.
        """
        every = self.log_every_steps or -(-self.n_steps // CURVE_POINTS)
        return step % every == 0 or step in (fork_step, self.n_steps - 1)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.batch_tokens % self.sequence_tokens:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of sequence_tokens ({self.sequence_tokens})"
            )
        if self.recipe_except is not None and self.recipe is None:
            raise ValueError("recipe_except has a meaning only with recipe; remove it")
        if bool(self.rate_token_exponent) != (self.rate_at_tokens is not None):
            raise ValueError(
                "rate_token_exponent and rate_at_tokens, the tokens of a run whose peak is learning_rate, need each other"
            )
        if self.earlier_tokens:
            self._check_earlier_tokens()
        return self

    def _check_earlier_tokens(self) -> None:
        if self.schedule != "wsd" or not self.rate_token_exponent:
            raise ValueError("earlier_tokens has a meaning only with schedule: wsd and a rate_token_exponent; remove it")
        budgets = (*self.earlier_tokens, self.tokens)
        if any(budget >= following for budget, following in pairwise(budgets)):
            raise ValueError(
                f"earlier_tokens must ascend and be less than tokens ({self.tokens}), not {[*self.earlier_tokens]}"
            )
        if self.warmup_steps > self.plateaus[0][0]:
            raise ValueError(
                f"warmup_tokens ({self.warmup_tokens}) must end before the decay of the smallest budget starts, after "
                f"{self.plateaus[0][0] * self.batch_tokens} tokens, because the learning rate steps there; change one"
            )


# Keys of `train` that were added since train.VERSION 1, each with the value that changes nothing. At this value the setting is
# left out of the key of a cell, so that finished runs keep their keys.
ADDED_TRAIN_KEYS: dict[str, Any] = {
    "gradient_precision": "bf16",
    "rate_token_exponent": 0.0,
    "rate_at_tokens": None,
    "earlier_tokens": [],  # as JSON has it
    "embedding_rate": 1.0,
    "matrix_rate": 1.0,
    "vector_rate": 1.0,
    "recipe": None,  # of a cell it is None: planning/grid has set its keys
    "recipe_except": None,
}
# Keys of `train` that change no loss: they are not in the key of a cell, and may change when a run resumes.
PASSIVE_TRAIN_KEYS = frozenset({"log_every_steps"})


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    """Workers, ZeRO and checkpoints. These keys change speed and fault tolerance, not results (up to float summation order)."""

    address: str | None = None  # address of a Ray cluster; None: $RAY_ADDRESS, else a Ray started for this command
    n_workers: Count = 2  # worker processes per run
    min_workers: Count | None = None  # elastic: run with as few as this many workers; None: wait for all
    wait_seconds: Natural = 0  # seconds to wait at the start until an autoscaling cluster has the resources for the workers
    cpus_per_worker: Count = 1  # CPUs reserved for each worker
    gpus_per_worker: Annotated[float, Field(ge=0, le=1)] = (
        0  # GPUs of each worker: 0, 1, or a share of one such as 0.25, with which four runs of one worker are on a GPU
    )
    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"  # Ray's strategy: few nodes, many, or a node each
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1  # DeepSpeed ZeRO stage: what is sharded over the workers
    micro_batch_rows: Count | None = None  # rows per forward pass (gradient accumulation); None: the worker's whole share
    activation_checkpointing: bool = False  # compute each block again in the backward pass: less memory, a third more FLOPs
    offload: Literal["optimizer"] | None = (
        None  # optimizer: keep the optimizer state in the CPU's memory; needs zero_stage >= 1
    )
    max_failures: Natural = 3  # restarts of a run after lost workers, before it fails
    checkpoint_every_steps: Count = 100  # optimizer steps between checkpoints
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # newest intact checkpoints to keep per run
    keep_optimizer_state: bool = (
        True  # false: of a run that has ended only the weights are kept, and of its trunk's branch points those still needed
    )

    @property
    def has_ranks_on_one_gpu(self) -> bool:
        """Whether several workers of one run may be on the same GPU, where NCCL fails: "Duplicate GPU detected".

        Ray puts a share of a GPU on one GPU, as many as it holds; so workers with more than half a GPU have one for themselves.
        """
        return 0 < self.gpus_per_worker <= 0.5 and self.n_workers > 1 and self.placement != "STRICT_SPREAD"

    @model_validator(mode="after")
    def _consistent(self) -> "ClusterConfig":
        if 0 < self.gpus_per_worker < LEAST_GPU_SHARE:
            raise ValueError(f"gpus_per_worker must be 0, or {LEAST_GPU_SHARE:g} to 1, not {self.gpus_per_worker:g}")
        if self.min_workers and self.min_workers > self.n_workers:
            raise ValueError(f"min_workers ({self.min_workers}) must not be more than n_workers ({self.n_workers})")
        if self.offload and not self.zero_stage:
            raise ValueError(f"offload: {self.offload} needs zero_stage 1, 2 or 3")
        return self
