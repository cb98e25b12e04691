"""The weights in a checkpoint or an exported folder: one file of safetensors. Nothing is unpickled.

Apart from train/checkpoint, which needs no torch. Called by the workers and train/export.
"""

import json
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
from torch import Tensor

from lmu_dist.config import Folder
from lmu_dist.train.checkpoint import META, Meta

WEIGHTS = "model.safetensors"


def write_weights(folder: Path, meta: Meta, weights: dict[str, Tensor]) -> None:
    """Adds the weights and meta.json to rank 0's part of a checkpoint."""
    safetensors.torch.save_file(weights, folder / WEIGHTS)
    (folder / META).write_text(json.dumps(asdict(meta)))


def read_weights(folder: Folder) -> dict[str, Tensor]:
    """Weights by parameter name."""
    return safetensors.torch.load((folder / WEIGHTS).read_bytes())
