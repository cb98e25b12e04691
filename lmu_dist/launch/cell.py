"""A cell: one run of a grid, with a key that is equal for equal runs. Made from a Config and a Corpus by launch/new_cell.

Cells travel from the driver to the processes of Ray Tune and Ray Train, many of which need no torch: this file imports none.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from lmu_dist.config import Config, Folder
from lmu_dist.data.corpus import Corpus
from lmu_dist.models.counts import Flops, Parameters
from lmu_dist.models.family_source import FamilySource
from lmu_dist.models.shape import Shape
from lmu_dist.records import Appearance

BRANCH_POINTS = "branch_points"  # folder in a trunk's folder, with the checkpoints from which decay branches start


@dataclass(frozen=True)
class Cell:
    """Everything that determines a run before it starts.

    Cells with the same trunk take the same steps until the learning rate of the first one decays. With the schedule `wsd` these
    are the cells that differ only in their number of tokens; with `cosine` every cell is its own trunk.
    """

    config: Config
    corpus: Corpus
    shape: Shape
    parameters: Parameters
    flops: Flops
    appearance: Appearance  # of the family
    family_version: str
    code_digest: str  # of the sources of models/ and train/, for the record only
    key: str
    trunk: str
    retry_of: str = ""  # key of the cell that diverged, if this is its retry at half the learning rate
    family_source: FamilySource | None = None  # a family in a user's own file, for processes that do not see the file

    @property
    def validation_rows(self) -> str:
        """How many rows, spread evenly over the validation split, are evaluated, as in "256 of 300"; "" if all of them are."""
        return validation_rows_of(self.config, self.corpus)

    @property
    def name(self) -> str:
        """A readable name: family, size, tokens, seed and the start of the key."""
        size, tokens = _short(self.config.model.n_params), _short(self.config.train.tokens)
        return f"{self.shape.family}-{size}-{tokens}-s{self.config.seed}-{self.key[:12]}"

    @property
    def trunk_folder(self) -> Folder:
        """The folder that holds the folders of the trunk's cells and its branch points."""
        name = f"{self.shape.family}-{_short(self.config.model.n_params)}-s{self.config.seed}-{self.trunk[:12]}"
        return self.config.storage_folder / name

    @property
    def folder(self) -> Folder:
        """The folder of the run's checkpoints, metrics log and record.json."""
        return self.trunk_folder / f"{_short(self.config.train.tokens)}-{self.key[:12]}"


def validation_rows_of(config: Config, corpus: Corpus) -> str:
    """How many rows of the validation split a run evaluates; see `Cell.validation_rows`."""
    n_evaluated = max(1, config.train.eval_tokens // config.train.sequence_tokens)
    n_rows = corpus.n_rows("validation", config.train.sequence_tokens)
    return f"{n_evaluated} of {n_rows}" if n_evaluated < n_rows else ""


def git_commit(root: Path = Path(__file__).parent) -> str:
    """The git commit of a folder, by default of this code, with "+" if files are modified; "unknown" outside a checkout."""
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
