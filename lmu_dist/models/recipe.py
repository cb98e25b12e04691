"""Recipe: the optimizer settings of a family's paper, or of the nearest one. Every Family has one; planning/recipes applies it.

A recipe has neither learning rate, warm-up, batch nor schedule: these depend on size and budget, and a study tunes or rules
them for all families alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lmu_dist.config.types import ConfigError

# Keys of `train` that a recipe may set.
RECIPE_KEYS = (
    *("beta1", "beta2", "eps", "weight_decay", "clip_norm"),
    *("embedding_rate", "matrix_rate", "vector_rate"),
)


@dataclass(frozen=True)
class Recipe:
    """Values for RECIPE_KEYS, as far as the source states them, and the source: paper, section and number."""

    source: str
    settings: Mapping[str, float]

    def __post_init__(self) -> None:
        if unknown := [key for key in self.settings if key not in RECIPE_KEYS]:
            raise ConfigError(f"a recipe cannot set {', '.join(unknown)}; it may set {', '.join(RECIPE_KEYS)}")


KAPLAN = Recipe(
    "Kaplan et al. 2020, section 2.2 (arXiv 2001.08361): Adam, whose defaults are those of Kingma and Ba (arXiv 1412.6980)",
    {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
)
LLAMA = Recipe(
    "Touvron et al. 2023, section 2.3 (arXiv 2302.13971)",
    {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0},
)
GATED_DELTANET = Recipe(
    "Yang et al. 2024, section 4 (arXiv 2412.06464); betas, which it does not state, as in Mamba",
    {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0},
)
MAMBA = Recipe(
    "Gu and Dao 2023, appendix E.2.1 (arXiv 2312.00752), kept by Mamba-2 (arXiv 2405.21060)",
    {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0},
)
