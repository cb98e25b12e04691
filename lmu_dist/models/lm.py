"""LanguageModel: the network of a Shape, built and initialised. Maps token ids to losses in nats per token, or to logits.

The families differ only in their sublayers; what all of them compute is in models/network. Called by train, and by all that
need an untrained model.
"""

from typing import Any

import torch
from torch import nn

from lmu_dist.models import norms
from lmu_dist.models.network import Network
from lmu_dist.models.registry import family_of
from lmu_dist.models.shape import Shape
from lmu_dist.models.width_transfer import width_ratio


class LanguageModel(Network):
    """The Network of a shape, with the weights of a seed.

    The same seed gives the same weights on every rank and every device: all random numbers are drawn on the CPU, in float32.
    The weights are on `device` in `dtype`; None keeps the dtype in which modules are built. While the model is built, the CPU
    holds one sublayer or matrix at a time, if the weights are elsewhere. `options` are the options of the family; None stands
    for the defaults.
    """

    def __init__(
        self,
        shape: Shape,
        seed: int = 0,
        options: Any = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        family = family_of(shape)
        options = family.Options() if options is None else options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Order and dtype of all random numbers are part of a seed's weights, and so are those that `initialise` replaces.
            embedding = nn.Embedding(shape.vocab_tokens, shape.d_model).to(device, dtype)
            position = (
                nn.Embedding(shape.sequence_tokens, shape.d_model).to(device, dtype) if family.learned_positions else None
            )
            sublayer_norms = nn.ModuleList(
                norms.build(family.norm, shape.d_model) if family.residual else nn.Identity()
                for _ in range(family.n_sublayers(shape))
            ).to(device, dtype)
            sublayers = nn.ModuleList(sublayer.to(device, dtype) for sublayer in family.sublayers(shape, options))
            norm = norms.build(family.norm, shape.d_model).to(device, dtype)
            super().__init__(
                embedding, position, sublayer_norms, sublayers, norm, family.residual, width_ratio(shape), shape.n_blocks
            )
            self.shape = shape
            self.initialise(in_default_dtype=dtype is not None)
