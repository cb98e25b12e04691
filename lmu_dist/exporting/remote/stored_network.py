"""Builds the network that a config.json describes: its section `network` in, an untrained Network out.

Called by modeling_lmu_dist, and by exporting/transformers_folder to check a folder.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lmu_dist.exporting.remote.sublayer_classes import SUBLAYER_CLASSES
from lmu_dist.models import norms
from lmu_dist.models.network import Network


def build(stored: Mapping[str, Any], vocab_tokens: int, width: int) -> Network:
    """The network with weights as its modules draw them.

    stored:
      positions     number of learned positions; 0: there are none
      norm          "layer" or "rms"
      residual      whether sublayers are added to the residual stream
      logit_factor  factor of the logits
      n_blocks      number of blocks
      sublayers     (name of the class, its arguments by name) of each sublayer, in order
    """
    sublayers = [SUBLAYER_CLASSES[name](**arguments) for name, arguments in stored["sublayers"]]
    positions, residual = stored["positions"], stored["residual"]
    return Network(
        nn.Embedding(vocab_tokens, width),
        nn.Embedding(positions, width) if positions else None,
        nn.ModuleList(norms.build(stored["norm"], width) if residual else nn.Identity() for _ in sublayers),
        nn.ModuleList(sublayers),
        norms.build(stored["norm"], width),
        residual,
        stored["logit_factor"],
        stored["n_blocks"],
    )
