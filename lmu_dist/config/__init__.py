"""Configuration of runs and grids of runs: sections in `run` and `study`, reading and validation in `load`."""

from lmu_dist.config.load import Config, flatten, load, parse, sources, to_dict, with_settings
from lmu_dist.config.run import ClusterConfig, DataConfig, ModelConfig, TokenizerConfig, TrainConfig
from lmu_dist.config.study import LadderConfig, AssumedLaw, PlanConfig, Range, Rule, TuneConfig, Tuned, WorkersFrom
from lmu_dist.config.types import ConfigError, FailedError, Family, Folder, open_folder

__all__ = [
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "FailedError",
    "Family",
    "Folder",
    "LadderConfig",
    "AssumedLaw",
    "ModelConfig",
    "PlanConfig",
    "Range",
    "Rule",
    "TokenizerConfig",
    "TrainConfig",
    "TuneConfig",
    "Tuned",
    "WorkersFrom",
    "flatten",
    "load",
    "open_folder",
    "parse",
    "sources",
    "to_dict",
    "with_settings",
]
