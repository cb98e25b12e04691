"""The classes of a model's sublayers, by the names that config.json has of them. Every exported folder has its own."""

from torch import nn

SUBLAYER_CLASSES: dict[str, type[nn.Module]] = {}
