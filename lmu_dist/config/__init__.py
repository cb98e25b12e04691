"""Configuration of runs and grids of runs: sections in `run` and `study`, reading and validation in `load`."""

from lmu_dist.config.load import Config, flatten, load, parse, sources, to_dict, with_overrides, with_settings
from lmu_dist.config.run import (
    ADDED_TRAIN_KEYS,
    PASSIVE_TRAIN_KEYS,
    ClusterConfig,
    DataConfig,
    ModelConfig,
    TokenizerConfig,
    TrainConfig,
)
from lmu_dist.config.study import AssumedLaw, LadderConfig, PlanConfig, Range, Rule, TuneConfig, Tuned, Until, WorkersFrom
from lmu_dist.config.types import ConfigError, FailedError, Family, Folder, open_folder

__all__ = [
    "ADDED_TRAIN_KEYS",
    "PASSIVE_TRAIN_KEYS",
    "AssumedLaw",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "FailedError",
    "Family",
    "Folder",
    "LadderConfig",
    "ModelConfig",
    "PlanConfig",
    "Range",
    "Rule",
    "TokenizerConfig",
    "TrainConfig",
    "TuneConfig",
    "Tuned",
    "Until",
    "WorkersFrom",
    "flatten",
    "load",
    "open_folder",
    "parse",
    "sources",
    "to_dict",
    "with_overrides",
    "with_settings",
]
