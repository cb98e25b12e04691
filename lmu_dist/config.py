"""Configuration of a run: a YAML file and dotted overrides in, one frozen, validated Config out. Builds nothing.

Precedence: defaults here < YAML < `section.key=value`. Every command and every job file goes through `load`.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class ConfigError(ValueError):
    """Bad input of the user: the message names the key and the fix. The command line exits with 2."""


class FailedError(RuntimeError):
    """Work that was started and did not end well; the message is one line. The command line exits with 1."""


def _whole(value: Any) -> Any:
    """Lets 2.5e6 stand for a count."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Natural = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

_STRICT = ConfigDict(extra="forbid", strict=True, validate_default=True)


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """What is trained: a family and its size. None leaves a width to the rule in models/sizing."""

    family: Literal["lmu", "lmu_attention", "transformer", "lstm"] = "lmu"
    n_params: Count = 56_000  # non-embedding N, met within 2 %
    n_blocks: Count = 2
    order: Count | None = None
    reduced_order: Count | None = None
    theta_tokens: Count | None = None


@dataclass(frozen=True, config=_STRICT)
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
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # decoupled (AdamW)
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"
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
    def eval_every_steps(self) -> int:
        """Steps between evaluations."""
        return max(1, self.eval_every_tokens // self.batch_tokens)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.batch_tokens % self.sequence_tokens:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of sequence_tokens ({self.sequence_tokens})"
            )
        if self.warmup_steps >= self.n_steps:
            raise ValueError(f"warmup_tokens ({self.warmup_tokens}) must be less than tokens ({self.tokens})")
        return self


@dataclass(frozen=True, config=_STRICT)
class ClusterConfig:
    """On what it runs. Changes how fast and how safely, not what is computed (to the order of float sums)."""

    address: str | None = None  # of a Ray cluster; None: $RAY_ADDRESS, else a local one for this command
    n_workers: Count = 2
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    micro_batch_rows: Count | None = None  # rows of one forward pass; None: the worker's whole share
    max_failures: Natural = 3  # restarts after a lost worker
    checkpoint_every_steps: Count = 100
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2


@dataclass(frozen=True, config=_STRICT)
class Config:
    """Everything a run is made from."""

    experiment: Name = "lmu-dist"
    storage: str = "runs"  # prepared data, checkpoints, spools; shared by all nodes of the cluster
    seed: Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def storage_folder(self) -> Path:
        """Storage as an absolute path: Ray's workers run in folders of their own."""
        return Path(self.storage).expanduser().absolute()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if "://" in self.storage:
            raise ValueError(f"storage: {self.storage!r} is no folder; give a path on a disk that all nodes share")
        rows, workers = self.train.batch_rows, self.cluster.n_workers
        if rows % workers:
            raise ValueError(
                f"cluster.n_workers ({workers}) must divide the {rows} rows of a batch "
                "(train.batch_tokens / train.sequence_tokens)"
            )
        share, micro = rows // workers, self.cluster.micro_batch_rows
        if micro and share % micro:
            raise ValueError(f"cluster.micro_batch_rows ({micro}) must divide the {share} rows of a worker's batch")
        return self


_ADAPTER = TypeAdapter(Config)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides in order, validates. Raises ConfigError with one line per fault."""
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: 1e-3 is a number, a key given twice is an error
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}; give the path of a YAML file such as jobs/train.yaml") from e
    except (YAMLError, ValueError) as e:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold keys and values, not a {type(tree).__name__}")
    return parse(_override(tree or {}, overrides))


def parse(tree: dict[str, Any]) -> Config:
    """Validates a nested mapping. Raises ConfigError."""
    try:
        return _ADAPTER.validate_json(json.dumps(tree), strict=True)
    except TypeError as e:
        raise ConfigError(f"configuration: {e}; keys are words, values are numbers, text or lists") from e
    except ValidationError as e:
        raise ConfigError("\n".join(dict.fromkeys(_explain(error) for error in e.errors()))) from e


def to_dict(config: Config) -> dict[str, Any]:
    """The whole configuration, defaults included, as plain JSON types; `parse` gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}, the dotted keys of the command line."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    yaml = YAML(typ="safe", pure=True)
    for text in overrides:
        dotted, equals, value = text.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"override {text!r} is not of the form section.key=value")
        *sections, key = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{dotted}: {section} is a value, not a section")
        try:
            node[key] = yaml.load(value) if value else None
        except (YAMLError, ValueError) as e:
            raise ConfigError(f"{dotted}: cannot read the value {value!r}; quote it as in YAML") from e
    return tree


def _explain(error: Any) -> str:
    """One line from one pydantic error: the dotted key, what is wrong, the fix."""
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-")))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = list(flatten(to_dict(Config())))
        near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.endswith("." + key.split(".")[-1])]
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "; see lmu_dist/config.py for all keys")
    given = error.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{key + ': ' if key else ''}{message[:1].lower() + message[1:]}{shown}"
