"""A cell: one run of a grid, with a key that is equal for equal runs. Made from a Config and a Corpus by `make_cell`."""

import functools
import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lmu_dist
from lmu_dist.config import ADDED_TRAIN_KEYS, Config, ConfigError, Folder, to_dict, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.models import registry
from lmu_dist.models.accounting import parameters
from lmu_dist.models.family import Family
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.registry import FamilySource
from lmu_dist.models.shape import Shape
from lmu_dist.planning.grid import shape_of, trunk_settings
from lmu_dist.train import VERSION

CODE = (".py", ".cpp", ".h")
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
    family_version: str
    code_digest: str  # of the sources of models/ and train/, for the record only
    key: str
    trunk: str
    retry_of: str = ""  # key of the cell that diverged, if this is its retry at half the learning rate
    family_source: FamilySource | None = None  # a family in a user's own file, for processes that do not see the file

    @property
    def validation_rows(self) -> str:
        """How many rows, spread evenly over the validation split, are evaluated, as in "256 of 300"; "" if all of them are."""
        return _validation_rows(self.config, self.corpus)

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


def make_cell(config: Config, corpus: Corpus) -> Cell:
    """Makes the cell of a configuration: its widths, key and trunk. Raises ConfigError if no widths give the requested size."""
    # An absolute path, because the processes of a cluster have other working directories.
    reference = registry.absolute_reference(config.model.family)
    config = with_settings(config, {"storage": str(config.storage_folder), "model.family": reference})
    shape = shape_of(config, corpus.manifest.vocab_tokens)
    corpus.check_rows("train", config.train.sequence_tokens)
    corpus.check_rows("validation", config.train.sequence_tokens)
    family, train = registry.find(reference), to_dict(config)["train"]
    [source] = registry.sources({reference}) or [None]

    def digest(settings: dict[str, Any]) -> str:
        return key_of(config, settings, shape, family, corpus.manifest.data_digest, _validation_rows(config, corpus))

    key, trunk = digest(train), digest(trunk_settings(train))
    return Cell(config, corpus, shape, str(family.version), code_digest(), key, trunk, family_source=source)


def key_of(
    config: Config, train: Mapping[str, Any], shape: Shape, family: Family, data_digest: str, validation_rows: str = ""
) -> str:
    """sha256 of everything that determines the losses of a run, and of nothing else.

    It does not depend on the storage and the number of workers, nor on the source code. The code is represented by the versions
    it declares (`Family.version`, `train.VERSION`), which tests/models/test_golden.py and tests/train/test_golden.py check.
    """
    model = config.model
    if train["precision"] == "fp32":  # gradients have the precision of the weights
        train = {key: value for key, value in train.items() if key != "gradient_precision"}
    # Options that are widths, or act only through them, are in the shape, whether they were given or follow from a rule.
    in_shape_or_passive = {*family.passive_options, *family.sizing_options, *shape.widths}
    options = {key: value for key, value in model.options.items() if key not in in_shape_or_passive}
    content = {
        "family": [family.name, str(family.version)],
        "train_version": VERSION,
        "model": {"n_params": model.n_params, "n_blocks": model.n_blocks, **options},
        "train": {key: value for key, value in train.items() if key not in ADDED_TRAIN_KEYS or value != ADDED_TRAIN_KEYS[key]},
        "seed": config.seed,
        "data": data_digest,
        "shape": shape.to_dict(),
        # Earlier versions evaluated the first rows of the split. Where all rows are evaluated, their runs keep their keys.
        **({"validation_rows": validation_rows} if validation_rows else {}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _validation_rows(config: Config, corpus: Corpus) -> str:
    n_evaluated = max(1, config.train.eval_tokens // config.train.sequence_tokens)
    n_rows = corpus.n_rows("validation", config.train.sequence_tokens)
    return f"{n_evaluated} of {n_rows}" if n_evaluated < n_rows else ""


def build_model(config: Config, shape: Shape, device: torch.device) -> LanguageModel:
    """The untrained network of a run on a device, in the precision of its training."""
    family = registry.family_of(shape)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = LanguageModel(shape, config.seed, registry.options_of(family, config.model.options), device, dtype)
    built, counted = sum(p.numel() for p in model.parameters()), parameters(shape).total
    if built != counted:
        raise ConfigError(
            f"family {family.name}: the model has {built:,} parameters and {counted:,} were counted; options that change its "
            "size must be among its `widths` (docs/families.md)"
        )
    return model


def at_half_rate(cell: Cell) -> Cell:
    """The retry of a cell that diverged, at half the learning rate."""
    halved = with_settings(cell.config, {"train.learning_rate": cell.config.train.learning_rate / 2})
    return replace(make_cell(halved, cell.corpus), retry_of=cell.key)


@functools.cache
def code_digest() -> str:
    """sha256 of the sources of models/ and train/, for the record: a key does not depend on it."""
    sha = hashlib.sha256()
    root = Path(lmu_dist.__file__).parent
    paths = (p for package in ("models", "train") for p in (root / package).rglob("*") if p.suffix in CODE)
    for path in sorted(paths):
        sha.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()


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
