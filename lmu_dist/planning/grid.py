"""Expands a configuration into the cells of its grid: one Config and Shape per run, cheapest first.

Learning rate, batch, warm-up and workers of a size are computed only here. Called by launch/ladder and planning/cost.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from lmu_dist.config import Config, ConfigError, Family, LadderConfig, Tuned, WorkersFrom, with_settings
from lmu_dist.config.load import COMMON_MODEL_KEYS
from lmu_dist.models import accounting, registry
from lmu_dist.models.family import Family as FamilyOfModels
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import shape_for
from lmu_dist.planning.recipes import recipe_settings, with_recipe


@dataclass(frozen=True)
class GridCell:
    """One run of a grid: its configuration and its widths. launch/cell adds the data and the key."""

    config: Config
    shape: Shape

    @property
    def trained_tokens(self) -> int:
        """Training tokens of the run, a multiple of the batch."""
        return self.config.train.n_steps * self.config.train.batch_tokens

    @property
    def training_flops(self) -> float:
        """Training FLOPs of the run, including the head and FFTs."""
        return self.trained_tokens * accounting.flops(self.shape).training


def shape_of(config: Config, vocab_tokens: int) -> Shape:
    """The widths of a run.

    Raises ConfigError if no widths give model.n_params or model.base_n_params, if the family does not have one of the keys
    under `model`, if one that is no width changes its number of parameters, or if its rates do not transfer between widths.
    """
    model, family = config.model, registry.find(config.model.family)
    options = json.dumps(dict(model.options), sort_keys=True)
    sizes = (vocab_tokens, config.train.sequence_tokens, model.n_blocks, options)
    shape = _shape(family, model.n_params, *sizes)
    if model.base_n_params is None:
        return shape
    if not family.rates_transfer:
        raise ConfigError(
            f"model.base_n_params={model.base_n_params}: learning rates of family {family.name} are not known to hold at "
            "every width; remove the key, or for a family of your own set rates_transfer in its class (docs/recipes.md)"
        )
    try:
        base = _shape(family, model.base_n_params, *sizes)
    except ConfigError as e:
        raise ConfigError(f"model.base_n_params={model.base_n_params}: the base cannot be built: {e}") from e
    # A model that is its own base is an ordinary model, and has the key of one.
    return shape if base == shape else replace(shape, base=base)


@lru_cache(maxsize=4096)
def _shape(
    family: FamilyOfModels, n_params: int, vocab_tokens: int, sequence_tokens: int, n_blocks: int, options: str
) -> Shape:
    """The widths of a size, which the cells of all its seeds and budgets share. `options`: the family's keys, as JSON."""
    given = registry.options_of(family, json.loads(options))
    try:
        shape = shape_for(
            family,
            n_params,
            vocab_tokens=vocab_tokens,
            sequence_tokens=sequence_tokens,
            n_blocks=n_blocks,
            options=given,
        )
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"model: {e}") from e
    accounting.check_options(shape, given)
    return shape


def families_of(config: Config) -> list[Family]:
    """References of the families that a configuration trains: of its ladder, its search, or its single run."""
    grid = config.ladder or config.tune
    return list(grid.families if grid else (config.model.family,))


def all_references(config: Config) -> list[Family]:
    """References of all families that a configuration names, also of those that it does not train."""
    tuned = [entry.family for entry in config.ladder.tuned] if config.ladder else []
    return list(dict.fromkeys([*families_of(config), config.model.family, *tuned]))


def check_families(config: Config) -> None:
    """Raises ConfigError if a family does not exist, or if none of the families has a key that is set under `model`."""
    families = [registry.find(reference) for reference in families_of(config)]
    for reference in all_references(config):
        registry.find(reference)
    for key in config.tune.space if config.tune else ():
        section, _, name = key.partition(".")
        if section == "model" and name not in COMMON_MODEL_KEYS:
            for family in families:
                if name not in registry.option_names(family):
                    registry.options_of(family, {name: None})  # raises an error that lists the known keys
    for key in config.model.options:
        if not any(key in registry.option_names(family) for family in families):
            registry.options_of(families[0], {key: config.model.options[key]})  # raises an error that lists the known keys


def grid(config: Config, vocab_tokens: int) -> tuple[list[GridCell], list[GridCell]]:
    """The cells of a configuration, cheapest first, and the cells that exceed ladder.max_cell_flops.

    A configuration without a ladder has one cell for every family and size of `tune`, or else the single run it describes.
    Raises ConfigError with the name of the cell if a rule gives an impossible setting.
    """
    check_families(config)
    cells = list[GridCell]()
    for name, make_config in _named_cells(config):
        try:
            run = make_config()
            cells.append(GridCell(run, shape_of(run, vocab_tokens)))
        except ConfigError as e:
            raise ConfigError(f"{name}: {e}" if name else str(e)) from e
    cells.sort(key=lambda cell: cell.training_flops)
    limit = config.ladder.max_cell_flops if config.ladder else None
    limit = limit or math.inf
    kept = [cell for cell in cells if cell.training_flops <= limit]
    left_out = [cell for cell in cells if cell.training_flops > limit]
    if not kept:
        raise ConfigError(
            f"every cell exceeds ladder.max_cell_flops={limit:g}: the cheapest one needs {cells[0].training_flops:.3g} FLOPs; "
            "raise the limit or take smaller sizes or budgets"
        )
    return kept, left_out


def _named_cells(config: Config) -> Iterator[tuple[str, Callable[[], Config]]]:
    """The name of every cell, and a function that makes its configuration."""
    if (ladder := config.ladder) is not None:
        for family in _distinct(ladder.families):
            for n_params in sorted(set(ladder.n_params)):
                for tokens in token_budgets(ladder, n_params):
                    for seed in dict.fromkeys(ladder.seeds):
                        name = f"ladder: {registry.find(family).name}, N = {n_params:,}, {tokens:,} tokens"
                        yield name, partial(_cell_config, config, ladder, family, n_params, tokens, seed)
    elif (tune := config.tune) is not None:
        for family in _distinct(tune.families):
            for n_params in sorted(set(tune.n_params)):
                settings = recipe_settings(config, family) | unset_unknown_options(config, family)
                settings |= {
                    "model.family": family,
                    "model.n_params": n_params,
                    "tune": None,
                }
                yield f"tune: {registry.find(family).name}, N = {n_params:,}", partial(with_settings, config, settings)
    else:
        yield "", lambda: with_recipe(config)


def _distinct(references: Sequence[Family]) -> list[Family]:
    """The references without those that name the same family again."""
    return list({registry.find(reference).name: reference for reference in reversed(references)}.values())[::-1]


def unset_unknown_options(config: Config, family: Family) -> dict[str, None]:
    """Settings that remove the keys under `model` that this family does not have, because other families of the grid do."""
    known = registry.option_names(registry.find(family))
    return {f"model.{key}": None for key in config.model.options if key not in known}


def trunk_settings(train: dict[str, Any]) -> dict[str, Any]:
    """The settings of `train` that determine the steps before the decay of a wsd schedule; all settings for other schedules."""
    if train["schedule"] != "wsd":
        return train
    shared = {key: value for key, value in train.items() if key not in ("tokens", "decay_share", "earlier_tokens")}
    if train["rate_token_exponent"]:  # the first steps have the rate of the smallest budget
        shared["smallest_tokens"] = [*train["earlier_tokens"], train["tokens"]][0]
    return shared


def token_budgets(ladder: LadderConfig, n_params: int) -> list[int]:
    """The distinct token budgets of a size, smallest first."""
    return sorted({*ladder.tokens, *(round(n_params * share) for share in ladder.tokens_per_param)})


def _cell_config(config: Config, ladder: LadderConfig, family: Family, n_params: int, tokens: int, seed: int) -> Config:
    tuned = min(
        (t for t in ladder.tuned if registry.find(t.family) is registry.find(family)),
        key=lambda t: abs(math.log(t.n_params / n_params)),
        default=None,
    )
    settings = recipe_settings(config, family) | (dict(tuned.settings) if tuned else {})
    workers, cluster = _workers(ladder, n_params) or WorkersFrom(0, config.cluster.n_workers), config.cluster
    rules = {key: getattr(ladder, key) for key in ("learning_rate", "batch_tokens", "warmup_tokens")}
    scaled: dict[str, Any] = {}
    for key, rule in rules.items():
        if tuned and f"train.{key}" in settings:
            # The tuned value holds at the tuned size; the exponent of the rule scales it to this size.
            anchor = (float(settings.pop(f"train.{key}")), tuned.n_params)
            scaled[key] = rule.at(n_params, anchor) if rule else anchor[0]
        elif rule is not None:
            scaled[key] = rule.at(n_params)
    settings |= _rate_by_budget(config, ladder, tuned, tokens, n_params)
    row = config.train.sequence_tokens
    if "batch_tokens" in scaled:
        # Whole rows, regardless of the number of workers: the number of workers must not change the results of a cell.
        scaled["batch_tokens"] = max(1, round(scaled["batch_tokens"] / row)) * row
    if "warmup_tokens" in scaled:
        scaled["warmup_tokens"] = round(scaled["warmup_tokens"])
    settings |= {f"train.{key}": value for key, value in scaled.items()}
    settings = (
        unset_unknown_options(config, family)
        | settings
        | {"model.family": family, "model.n_params": n_params, "train.tokens": tokens, "seed": seed}
    )
    stage = cluster.zero_stage if workers.zero_stage is None else workers.zero_stage
    settings |= {"cluster.n_workers": workers.n_workers, "cluster.zero_stage": stage}
    settings |= {"cluster.micro_batch_rows": workers.micro_batch_rows or cluster.micro_batch_rows}
    recompute = workers.activation_checkpointing
    settings |= {"cluster.activation_checkpointing": cluster.activation_checkpointing if recompute is None else recompute}
    settings |= {"cluster.offload": workers.offload or cluster.offload}
    return with_settings(config, settings | {"ladder": None, "tune": None})


def _rate_by_budget(config: Config, ladder: LadderConfig, tuned: Tuned | None, tokens: int, n_params: int) -> dict[str, Any]:
    """The settings that make the learning rate of a cell depend on its budget; none if the rule of the ladder does not."""
    rule = ladder.learning_rate
    if rule is None or not rule.token_exponent:
        return {}
    settings, at_tokens = tuned.settings if tuned else {}, rule.at_tokens
    if tuned and "train.learning_rate" in settings:
        at_tokens = tuned.tokens
        if at_tokens is None:
            raise ConfigError(
                f"ladder.tuned: the entry of {tuned.family} at N = {tuned.n_params:,} has a learning rate and no tokens; add "
                "tokens: the budget of the search (its train.tokens), because ladder.learning_rate has a token_exponent"
            )
    found: dict[str, Any] = {"train.rate_token_exponent": rule.token_exponent, "train.rate_at_tokens": at_tokens}
    if settings.get("train.schedule", config.train.schedule) == "wsd":
        found["train.earlier_tokens"] = [budget for budget in token_budgets(ladder, n_params) if budget < tokens]
    return found


def _workers(ladder: LadderConfig, n_params: int) -> WorkersFrom | None:
    fitting = [w for w in ladder.workers if w.n_params <= n_params]
    return max(fitting, key=lambda w: w.n_params, default=None)
