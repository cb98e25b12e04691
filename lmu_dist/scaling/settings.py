"""The settings of a run: what `tune` may vary. Together with family, size, budget, seed and data they decide the loss.

Takes the record of a run and its params in MLflow. For collect, which compares only runs with the same settings.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lmu_dist.config import ADDED_TRAIN_KEYS, PASSIVE_TRAIN_KEYS, TrainConfig
from lmu_dist.models import registry
from lmu_dist.records import RunRecord

WIDTH = "width."  # start of the keys of widths
Settings = tuple[tuple[str, str | float], ...]  # (dotted key, value), sorted by key
# Keys of `model` and `train` that tell cells apart, that are compared elsewhere, or that change no loss of a complete run.
NOT_SETTINGS = frozenset({"model.family", "model.n_params", "train.tokens", "train.sequence_tokens", "train.divergence_factor"})
NOT_SETTINGS |= {"train.earlier_tokens"}  # the other budgets of the ladder
NOT_SETTINGS |= {f"train.{key}" for key in PASSIVE_TRAIN_KEYS}


def settings_of(record: RunRecord, params: Mapping[str, str]) -> Settings:
    """The settings of a run. Keys that the version of a run did not know have the value that changes nothing.

    Settings without effect are left out, and so are options of a family that have their default value. A retry at half the
    learning rate has the settings of the first attempt.
    """
    found: dict[str, Any] = {f"train.{key}": value for key, value in (asdict(TrainConfig()) | ADDED_TRAIN_KEYS).items()}
    found |= {"model.base_n_params": None}
    found |= {key: value for key, value in params.items() if key.startswith(("train.", "model."))}
    if found["model.base_n_params"] == found.get("model.n_params"):  # the base itself is an ordinary model
        found["model.base_n_params"] = None
    found |= {
        "model.n_blocks": record.n_blocks,
        "train.learning_rate": _learning_rate(record, params) * (2 if record.retry_of else 1),
        "train.batch_tokens": record.batch_tokens,
        "train.schedule": record.schedule,
        "train.precision": record.precision,
    }
    if record.gradient_precision:
        found["train.gradient_precision"] = record.gradient_precision
    without_effect = set(NOT_SETTINGS) | _unused_options(record, found)
    if record.schedule != "wsd":
        without_effect.add("train.decay_share")
    if record.precision == "fp32":
        without_effect.add("train.gradient_precision")
    if not float(found["train.plateau_patience"]):
        without_effect |= {"train.plateau_factor", "train.eval_every_tokens"}
    found |= {f"{WIDTH}{name}": width for name, width in json.loads(record.widths or "{}").items()}
    return tuple(sorted((key, _number(value)) for key, value in found.items() if key not in without_effect))


def with_widths(settings: Settings, others: Iterable[Settings]) -> Settings:
    """The settings with the widths of the first of the others that are equal but for widths: older records have none."""
    if any(key.startswith(WIDTH) for key, _ in settings):
        return settings
    return next((o for o in others if settings == tuple(pair for pair in o if not pair[0].startswith(WIDTH))), settings)


def difference(settings: Settings, best: Settings) -> str:
    """The settings that differ from the best ones, as in "learning rate 0.5 (best 0.01), weight decay 0.1 (best 0)"."""
    these, those = dict(settings), dict(best)
    keys = [key for key in sorted(these | those) if these.get(key) != those.get(key)]
    return ", ".join(f"{_words(key)} {_text(these.get(key))} (best {_text(those.get(key))})" for key in keys)


def _learning_rate(record: RunRecord, params: Mapping[str, str]) -> float:
    """The peak learning rate; where it depends on the budget that at rate_at_tokens, which all budgets of a ladder share."""
    if float(params.get("train.rate_token_exponent", 0.0)):
        return float(params["train.learning_rate"])
    return record.learning_rate


def _unused_options(record: RunRecord, params: Mapping[str, Any]) -> set[str]:
    """Keys of the family's own options that change no loss by themselves, or have their default value."""
    if record.family not in registry.names():
        return set()
    family = registry.find(record.family)
    names = {*family.passive_options, *family.sizing_options}
    names |= {name for name, value in asdict(family.Options()).items() if params.get(f"model.{name}") in (str(value), None)}
    return {f"model.{name}" for name in names} | {key for key in params if key.startswith(tuple(f"model.{n}." for n in names))}


def _number(value: Any) -> str | float:
    with suppress(TypeError, ValueError):
        return float(value)
    return str(value)


def _words(key: str) -> str:
    return key.partition(".")[2].replace("_", " ")


def _text(value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "default"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
