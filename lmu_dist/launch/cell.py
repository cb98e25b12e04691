"""A cell: one run of the grid, with the key that says when two runs are the same. (Config, Corpus) in, Cell out."""

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import lmu_dist
from lmu_dist.config import Config, ConfigError, to_dict
from lmu_dist.data.corpus import Corpus
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import shape_for


@dataclass(frozen=True)
class Cell:
    """Everything that is decided about a run before it starts."""

    config: Config
    corpus: Corpus
    shape: Shape
    code_digest: str
    key: str

    @property
    def name(self) -> str:
        """For people, and of the folder: family, size, seed and the start of the key."""
        model = self.config.model
        return f"{model.family}-{_short(model.n_params)}-s{self.config.seed}-{self.key[:12]}"

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints and its spool."""
        return self.config.storage_folder / self.name


def make_cell(config: Config, corpus: Corpus) -> Cell:
    """Works out widths and key. Raises ConfigError if no widths give the size asked for."""
    model, train = config.model, config.train
    try:
        shape = shape_for(
            model.family,
            model.n_params,
            vocab_tokens=corpus.manifest.vocab_tokens,
            sequence_tokens=train.sequence_tokens,
            n_blocks=model.n_blocks,
            order=model.order,
            reduced_order=model.reduced_order,
            theta_tokens=model.theta_tokens,
        )
    except ValueError as e:
        raise ConfigError(f"model: {e}") from e
    corpus.rows("train", train.sequence_tokens)
    corpus.rows("validation", train.sequence_tokens)
    code = code_digest()
    tree = to_dict(config)
    # What decides the losses and nothing else: not where the run is stored, nor on how many workers it runs.
    content = [tree["model"], tree["train"], tree["seed"], corpus.manifest.data_digest, asdict(shape), code]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Cell(config, corpus, shape, code, key)


def code_digest() -> str:
    """sha256 of the sources of models/ and train/: code that can move a loss."""
    sha = hashlib.sha256()
    root = Path(lmu_dist.__file__).parent
    for path in sorted(p for room in ("models", "train") for p in (root / room).glob("*.py")):
        sha.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()


def git_commit() -> str:
    """Commit of the code that runs, with + if it was changed since; "unknown" outside a checkout."""
    root = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if dirty.strip() else "")


def _short(n: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= unit:
            return f"{n / unit:.3g}{letter}"
    return str(n)
