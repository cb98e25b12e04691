"""A cell: one run of the grid, with the key that says when two runs are the same. (Config, Corpus) in, Cell out."""

import functools
import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lmu_dist
from lmu_dist.config import Config, Folder, to_dict, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.models.shape import Shape
from lmu_dist.planning.grid import shape_of, shared_settings

CODE = (".py", ".cpp", ".h")
FORKS = "forks"  # folder, beside the cells of a trunk, with the states from which their decays branch off


@dataclass(frozen=True)
class Cell:
    """Everything that is decided about a run before it starts.

    Cells with the same trunk compute the same steps until the first of them decays: under `wsd` those that differ in their
    tokens only. Under `cosine` every cell is a trunk of its own.
    """

    config: Config
    corpus: Corpus
    shape: Shape
    code_digest: str
    key: str
    trunk: str
    retry_of: str = ""  # key of the cell that diverged, of which this is the second try

    @property
    def name(self) -> str:
        """For people: family, size, tokens, seed and the start of the key."""
        model = self.config.model
        return f"{model.family}-{_short(model.n_params)}-{_short(self.config.train.tokens)}-s{self.config.seed}-{self.key[:12]}"

    @property
    def trunk_folder(self) -> Folder:
        """Where the cells of this trunk, and its forks, have their folders."""
        model = self.config.model
        name = f"{model.family}-{_short(model.n_params)}-s{self.config.seed}-{self.trunk[:12]}"
        return self.config.storage_folder / name

    @property
    def folder(self) -> Folder:
        """Where the run keeps its checkpoints and its spool."""
        return self.trunk_folder / f"{_short(self.config.train.tokens)}-{self.key[:12]}"


def make_cell(config: Config, corpus: Corpus) -> Cell:
    """Works out widths, key and trunk. Raises ConfigError if no widths give the size asked for."""
    # Absolute: the processes of a cluster have working folders of their own.
    config = with_settings(config, {"storage": str(config.storage_folder)})
    shape = shape_of(config, corpus.manifest.vocab_tokens)
    corpus.check_rows("train", config.train.sequence_tokens)
    corpus.check_rows("validation", config.train.sequence_tokens)
    code, tree = code_digest(), to_dict(config)

    def digest(train: dict[str, Any]) -> str:
        # What decides the losses and nothing else: not where the run is stored, nor on how many workers it runs.
        content = [tree["model"], train, tree["seed"], corpus.manifest.data_digest, asdict(shape), code]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    return Cell(config, corpus, shape, code, digest(tree["train"]), digest(shared_settings(tree["train"])))


def at_half_rate(cell: Cell) -> Cell:
    """The second try of a cell that diverged."""
    halved = with_settings(cell.config, {"train.learning_rate": cell.config.train.learning_rate / 2})
    return replace(make_cell(halved, cell.corpus), retry_of=cell.key)


@functools.cache
def code_digest() -> str:
    """sha256 of the sources of models/ and train/: code that can move a loss."""
    sha = hashlib.sha256()
    root = Path(lmu_dist.__file__).parent
    paths = (p for room in ("models", "train") for p in (root / room).rglob("*") if p.suffix in CODE)
    for path in sorted(paths):
        sha.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()


def git_commit(root: Path = Path(__file__).parent) -> str:
    """Commit of the code that runs (or of another folder), with + if it was changed since; "unknown" outside a checkout."""
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
