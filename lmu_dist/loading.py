"""lmu_dist.load: what `lmu-dist status` prints of a run in; its trained model with its tokenizer out."""

from os import PathLike, fspath

from lmu_dist.cli.common import run_folder
from lmu_dist.train.export import TrainedModel, load_trained_model


def load(run: str | PathLike[str], family: str | None = None) -> TrainedModel:
    """See `lmu_dist.load`."""
    return load_trained_model(run_folder(fspath(run)), family)
