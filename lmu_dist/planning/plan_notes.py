"""What a plan says besides its numbers: recipes, steps of the learning rate, repeated data. Cells in, lines for people out.

Called by cost.plan, before anything is trained; `repeat_notes` also by launch/new_cell, once the corpus is prepared.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.data.manifest import Manifest, locate, read_manifest
from lmu_dist.models import registry
from lmu_dist.planning.grid import GridCell, families_of
from lmu_dist.planning.recipes import recipe_of
from lmu_dist.records import REPEATED


def prepared_corpus(config: Config) -> Manifest | None:
    """The manifest of the prepared corpus; None if it is not on this machine, or its server does not answer."""
    with suppress(ConfigError, FailedError):
        corpus = locate(config.data, config.storage_folder)
        if corpus.prepared:
            return read_manifest(corpus.folder)
    return None


def epochs_of(cell: GridCell, corpus: Manifest) -> float:
    """How often a run trains on the rows of the corpus; more than 1: it repeats them."""
    return cell.trained_tokens / max(1, corpus.unique_tokens("train", cell.config.train.sequence_tokens))


def plan_notes(config: Config, cells: Sequence[GridCell], corpus: Manifest | None) -> tuple[str, ...]:
    """Lines about the cells that are planned."""
    return (*_recipes(config), *_rates(cells), *_transfers(cells), *repeat_notes(cells, corpus))


def _recipes(config: Config) -> Iterator[str]:
    """Which settings of the optimizer a recipe gives every family, and from which source."""
    for reference in families_of(config) if config.train.recipe else ():
        recipe, left_alone = recipe_of(config, reference), config.train.recipe_except or ()
        used = ", ".join(f"{key} {value:g}" for key, value in recipe.settings.items() if key not in left_alone)
        own = ", ".join(f"{key} {getattr(config.train, key):g}" for key in recipe.settings if key in left_alone)
        kept = f"; set by the configuration: {own}" if own else ""
        tuned = [t for t in config.ladder.tuned if registry.find(t.family) is registry.find(reference)] if config.ladder else []
        if any(key.removeprefix("train.") in recipe.settings for entry in tuned for key in entry.settings):
            kept += "; settings in ladder.tuned win over it"
        yield f"recipe of {registry.find(reference).name}: {used or 'nothing'}{kept}; from {recipe.source}"


def _rates(cells: Sequence[GridCell]) -> Iterator[str]:
    if any(cell.config.train.earlier_tokens for cell in cells):
        yield (
            "rate: where the decay of a smaller budget starts, the larger ones step to the next rate; a budget that is added "
            "between others or below them is a new step, so all larger ones are trained again"
        )


def _transfers(cells: Sequence[GridCell]) -> Iterator[str]:
    """Of which families learning rates are taken over from which base, and over how much of a width."""
    ratios = dict[tuple[str, int | None], set[float]]()
    for cell in cells:
        if cell.shape.base is not None:
            base = (cell.shape.family, cell.config.model.base_n_params)
            ratios.setdefault(base, set()).add(cell.shape.d_model / cell.shape.base.d_model)
    for (family, n_params), of_family in ratios.items():
        widths = ", ".join(f"{ratio:.3g}" for ratio in sorted(of_family))
        yield (
            f"rate: {family} takes over the rate of N = {n_params:,} at {widths} times its width, by model.base_n_params: "
            "rates of matrices go by fan-in, logits and scores are scaled"
        )


def repeat_notes(cells: Sequence[GridCell], corpus: Manifest | None) -> Iterator[str]:
    """Which budgets exceed the corpus; None: it is not prepared yet."""
    if corpus is None:
        yield "epochs: unknown until the corpus is prepared; a run with more tokens than the corpus has repeats its rows"
        return
    epochs = {cell.config.train.tokens: epochs_of(cell, corpus) for cell in cells}
    repeating = [f"{tokens:,} ({epochs[tokens]:.3g} epochs)" for tokens in sorted(epochs) if epochs[tokens] > REPEATED]
    if repeating:
        n_unique = corpus.unique_tokens("train", cells[0].config.train.sequence_tokens)
        yield (
            f"epochs: the corpus has {n_unique:,} training tokens; budgets above it repeat its rows, and the report marks "
            f"their runs: {', '.join(repeating)}"
        )
