"""From a configuration to its cells: (Config, vocabulary) in, one Config and Shape per cell out, cheapest first.

The one place that turns a size into learning rate, batch, warm-up and workers. Called by launch/ladder and by cost.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lmu_dist.config import Config, ConfigError, Family, LadderConfig, WorkersFrom, with_settings
from lmu_dist.models import accounting, registry
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import shape_for


@dataclass(frozen=True)
class Planned:
    """A cell of a grid before it has data or a key: the configuration of one run, and its widths."""

    config: Config
    shape: Shape

    @property
    def trained_tokens(self) -> int:
        """Tokens of the run, whole batches."""
        return self.config.train.n_steps * self.config.train.batch_tokens

    @property
    def training_flops(self) -> float:
        """FLOPs of the whole run, head and FFTs included."""
        return self.trained_tokens * accounting.flops(self.shape).training


def shape_of(config: Config, vocab_tokens: int) -> Shape:
    """The widths of a run. Raises ConfigError if none give the size asked for, or if the family has no such keys."""
    model, train = config.model, config.train
    family = registry.find(model.family)
    try:
        return shape_for(
            family,
            model.n_params,
            vocab_tokens=vocab_tokens,
            sequence_tokens=train.sequence_tokens,
            n_blocks=model.n_blocks,
            options=registry.options_of(family, model.options),
        )
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"model: {e}") from e


def families_of(config: Config) -> list[Family]:
    """References of the families that a configuration trains: those of its ladder or its search, else its one run's."""
    grid = config.ladder or config.tune
    return list(grid.families if grid else (config.model.family,))


def check_families(config: Config) -> None:
    """Raises ConfigError for a family that does not exist, and for keys under `model` that none of the families has."""
    found = [registry.find(reference) for reference in families_of(config)]
    named = [tuned.family for tuned in config.ladder.tuned] if config.ladder else []
    for reference in (config.model.family, *named):
        registry.find(reference)
    for key in config.model.options:
        if not any(key in registry.option_names(family) for family in found):
            registry.options_of(found[0], {key: config.model.options[key]})  # says what there is


def grid(config: Config, vocab_tokens: int) -> tuple[list[Planned], list[Planned]]:
    """The cells of a configuration, cheapest first, and those left out for exceeding ladder.max_cell_flops.

    Without a ladder: one trial for every family and size of `tune`, and without that the one run it describes. Raises
    ConfigError, naming the cell, when a rule gives an impossible setting.
    """
    check_families(config)
    planned = []
    for what, make in _wanted(config):
        try:
            cell = make()
            planned.append(Planned(cell, shape_of(cell, vocab_tokens)))
        except ConfigError as e:
            raise ConfigError(f"{what}: {e}" if what else str(e)) from e
    planned.sort(key=lambda p: p.training_flops)
    most = config.ladder.max_cell_flops if config.ladder else None
    most = most or math.inf
    kept, left_out = [p for p in planned if p.training_flops <= most], [p for p in planned if p.training_flops > most]
    if not kept:
        raise ConfigError(f"ladder.max_cell_flops={most:g} leaves no cell; the cheapest has {planned[0].training_flops:.3g}")
    return kept, left_out


def _wanted(config: Config) -> Iterator[tuple[str, Callable[[], Config]]]:
    """The name of every cell, and what makes its configuration."""
    if (ladder := config.ladder) is not None:
        for family in _distinct(ladder.families):
            for n_params in sorted(set(ladder.n_params)):
                for tokens in budgets(ladder, n_params):
                    for seed in dict.fromkeys(ladder.seeds):
                        what = f"ladder: {registry.find(family).name}, N = {n_params:,}, {tokens:,} tokens"
                        yield what, partial(_cell, config, ladder, family, n_params, tokens, seed)
    elif (tune := config.tune) is not None:
        for family in _distinct(tune.families):
            for n_params in sorted(set(tune.n_params)):
                settings = own_keys(config, family) | {"model.family": family, "model.n_params": n_params, "tune": None}
                yield f"tune: {registry.find(family).name}, N = {n_params:,}", partial(with_settings, config, settings)
    else:
        yield "", lambda: config


def _distinct(references: Sequence[Family]) -> list[Family]:
    """Each family once, however it is referred to."""
    return list({registry.find(reference).name: reference for reference in reversed(references)}.values())[::-1]


def own_keys(config: Config, family: Family) -> dict[str, None]:
    """Settings that take out the keys under `model` which are other families' of a grid."""
    known = registry.option_names(registry.find(family))
    return {f"model.{key}": None for key in config.model.options if key not in known}


def shared_settings(train: dict[str, Any]) -> dict[str, Any]:
    """Of the settings of a training, those that decide its steps before the decay; all of them unless the schedule is wsd."""
    if train["schedule"] != "wsd":
        return train
    return {key: value for key, value in train.items() if key not in ("tokens", "decay_share")}


def budgets(ladder: LadderConfig, n_params: int) -> list[int]:
    """Token budgets of a size, each once, smallest first."""
    return sorted({*ladder.tokens, *(round(n_params * share) for share in ladder.tokens_per_param)})


def _cell(config: Config, ladder: LadderConfig, family: Family, n_params: int, tokens: int, seed: int) -> Config:
    tuned = min(
        (t for t in ladder.tuned if registry.find(t.family) is registry.find(family)),
        key=lambda t: abs(math.log(t.n_params / n_params)),
        default=None,
    )
    settings = dict(tuned.settings) if tuned else {}
    workers, cluster = _workers(ladder, n_params) or WorkersFrom(0, config.cluster.n_workers), config.cluster
    rules = {key: getattr(ladder, key) for key in ("learning_rate", "batch_tokens", "warmup_tokens")}
    scaled: dict[str, Any] = {}
    for key, rule in rules.items():
        if tuned and f"train.{key}" in settings:
            # The tuned value holds at the tuned size; the rule says how it changes from there.
            anchor = (float(settings.pop(f"train.{key}")), tuned.n_params)
            scaled[key] = rule.at(n_params, anchor) if rule else anchor[0]
        elif rule is not None:
            scaled[key] = rule.at(n_params)
    row = config.train.sequence_tokens
    if "batch_tokens" in scaled:
        # Whole rows, whatever the number of workers: on how many a cell runs must not decide what it computes.
        scaled["batch_tokens"] = max(1, round(scaled["batch_tokens"] / row)) * row
    if "warmup_tokens" in scaled:
        scaled["warmup_tokens"] = round(scaled["warmup_tokens"])
    settings |= {f"train.{key}": value for key, value in scaled.items()}
    settings = (
        own_keys(config, family)
        | settings
        | {"model.family": family, "model.n_params": n_params, "train.tokens": tokens, "seed": seed}
    )
    stage = cluster.zero_stage if workers.zero_stage is None else workers.zero_stage
    settings |= {"cluster.n_workers": workers.n_workers, "cluster.zero_stage": stage}
    settings |= {"cluster.micro_batch_rows": workers.micro_batch_rows or cluster.micro_batch_rows}
    return with_settings(config, settings | {"ladder": None, "tune": None})


def _workers(ladder: LadderConfig, n_params: int) -> WorkersFrom | None:
    fitting = [w for w in ladder.workers if w.n_params <= n_params]
    return max(fitting, key=lambda w: w.n_params, default=None)
