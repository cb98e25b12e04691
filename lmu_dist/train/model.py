"""Builds the untrained network of a run. Called by the workers, and by launch/calibrate."""

import torch

from lmu_dist.config import Config
from lmu_dist.models import registry
from lmu_dist.models.accounting import check_parameters
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.shape import Shape


def build_model(config: Config, shape: Shape, device: torch.device) -> LanguageModel:
    """The untrained network of a run on a device, in the precision of its training.

    Raises ConfigError if it has another number of parameters than were counted.
    """
    family = registry.family_of(shape)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = LanguageModel(shape, config.seed, registry.options_of(family, config.model.options), device, dtype)
    check_parameters(shape, sum(p.numel() for p in model.parameters()))
    return model
