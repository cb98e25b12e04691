"""Makes cells: a Config and a Corpus in, a Cell out, with its widths, counts and key. Called by the drivers.

Imports the families, and so torch. The processes that only carry cells out import launch/cell.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmu_dist
from lmu_dist.config import ADDED_TRAIN_KEYS, PASSIVE_TRAIN_KEYS, Config, to_dict, with_settings
from lmu_dist.data.corpus import Corpus
from lmu_dist.launch.cell import Cell, validation_rows_of
from lmu_dist.models import accounting, registry
from lmu_dist.models.family import Family
from lmu_dist.models.shape import Shape
from lmu_dist.planning.grid import GridCell, shape_of, trunk_settings
from lmu_dist.planning.plan_notes import repeat_notes
from lmu_dist.train import VERSION

CODE = (".py", ".cpp", ".h")
logger = logging.getLogger(__name__)


def make_cell(config: Config, corpus: Corpus) -> Cell:
    """Makes the cell of a configuration: its widths, key and trunk. Raises ConfigError if no widths give the requested size."""
    # An absolute path, because the processes of a cluster have other working directories.
    reference = registry.absolute_reference(config.model.family)
    if (str(config.storage_folder), reference) != (config.storage, config.model.family):
        config = with_settings(config, {"storage": str(config.storage_folder), "model.family": reference})
    shape = shape_of(config, corpus.manifest.vocab_tokens)
    corpus.check_rows("train", config.train.sequence_tokens)
    corpus.check_rows("validation", config.train.sequence_tokens)
    family, train = registry.find(reference), to_dict(config)["train"]
    [source] = registry.sources({reference}) or [None]

    def digest(settings: dict[str, Any]) -> str:
        return key_of(config, settings, shape, family, corpus.manifest.data_digest, validation_rows_of(config, corpus))

    key, trunk = digest(train), digest(trunk_settings(train))
    return Cell(
        config=config,
        corpus=corpus,
        shape=shape,
        parameters=accounting.parameters(shape),
        flops=accounting.flops(shape),
        appearance=family.appearance(),
        family_version=registry.version_of(family, config.model.options),
        code_digest=code_digest(),
        key=key,
        trunk=trunk,
        family_source=source,
    )


def key_of(
    config: Config, train: Mapping[str, Any], shape: Shape, family: Family, data_digest: str, validation_rows: str = ""
) -> str:
    """sha256 of everything that determines the losses of a run, and of nothing else.

    It does not depend on the storage and the number of workers, nor on the source code. The code is represented by the versions
    it declares (`Family.version`, `train.VERSION`), which tests/models/test_golden.py and tests/train/test_golden.py check.
    """
    model = config.model
    train = {key: value for key, value in train.items() if key not in PASSIVE_TRAIN_KEYS}
    if train["precision"] == "fp32":  # gradients have the precision of the weights
        train = {key: value for key, value in train.items() if key != "gradient_precision"}
    # Options that are widths, or act only through them, are in the shape, whether they were given or follow from a rule.
    in_shape_or_passive = {*family.passive_options, *family.sizing_options, *shape.widths}
    options = {key: value for key, value in model.options.items() if key not in in_shape_or_passive}
    content = {
        "family": [family.name, registry.version_of(family, model.options)],
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


def log_repeats(cells: Sequence[Cell]) -> None:
    """Logs which budgets of the cells exceed their corpus, as `plan` prints it once the corpus is prepared."""
    for note in repeat_notes([GridCell(cell.config, cell.shape) for cell in cells], cells[0].corpus.manifest):
        logger.warning("%s", note)


def at_half_rate(cell: Cell) -> Cell:
    """The retry of a cell that diverged, at half the learning rate."""
    if cell.family_source is not None:
        registry.register(cell.family_source)  # this process may not see the file
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
