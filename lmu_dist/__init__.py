"""lmu-dist: distributed training of Legendre Memory Unit language models, and the scaling study around it."""

from importlib import import_module
from os import PathLike
from typing import Any

__version__ = "0.1.0"


def load(run: str | PathLike[str], family: str | None = None) -> Any:
    """The trained model of a run: a train.export.TrainedModel with `model`, `tokenizer` and `losses(text)`, in float32.

    `run` is a name or key that `lmu-dist status` prints, the folder of a run or of an export, or an MLflow run id. `family` is
    path/to/file.py:CLASS of a user's own family, whose code is then executed. Raises ConfigError.
    """
    # By name, so that this package's modules, which are its children, do not import the command line.
    return import_module("lmu_dist.loading").load(run, family)
