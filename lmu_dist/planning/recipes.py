"""Applies train.recipe: a configuration in, the optimizer settings of a family's recipe out. The cells of a grid have no recipe
any more, only its settings, so that their keys do not depend on how these were chosen.

Called by grid, plan_notes, launch/tune and launch/trainer.
"""

from typing import Any

from lmu_dist.config import Config, ConfigError, Family, with_settings
from lmu_dist.models import registry
from lmu_dist.models.recipe import Recipe

OWN_RECIPE = "family"  # value of train.recipe: that of each family


def with_recipe(config: Config, family: Family | None = None) -> Config:
    """The configuration with the settings of train.recipe in place of the key; without one, the configuration itself.

    `family`: reference of the family that is trained; None: model.family. Raises ConfigError as `recipe_settings` does.
    """
    return with_settings(config, settings) if (settings := recipe_settings(config, family or config.model.family)) else config


def recipe_settings(config: Config, family: Family) -> dict[str, Any]:
    """What train.recipe sets for a family, by dotted key, except what the configuration sets itself; {} without a recipe.

    Raises ConfigError if the recipe is of a family that does not exist.
    """
    train = config.train
    if train.recipe is None:
        return {}
    recipe = recipe_of(config, family).settings
    settings: dict[str, Any] = {f"train.{key}": recipe[key] for key in recipe if key not in (train.recipe_except or ())}
    return settings | {"train.recipe": None, "train.recipe_except": None}


def recipe_of(config: Config, family: Family) -> Recipe:
    """The recipe that train.recipe gives a family. Raises ConfigError if it names a family that does not exist."""
    named = config.train.recipe
    try:
        return registry.find(family if named in (None, OWN_RECIPE) else named).recipe
    except ConfigError as e:
        raise ConfigError(f"train.recipe: {e}, or {OWN_RECIPE} for the recipe of each family") from e
