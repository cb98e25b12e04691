"""The space of a search as Ray Tune has it: a TuneConfig in, domains, searcher and scheduler out. For launch/tune."""

from typing import Any

import optuna
from ray import tune as ray_tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from lmu_dist.config import Range, TrainConfig, TuneConfig

LOSS, TOKENS = "val_loss_nats", "tokens"  # what trials report


def settings(params: dict[str, Any]) -> dict[str, Any]:
    """What was drawn, with four digits: a learning rate has no more that matter."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in params.items()}


def searcher(tune: TuneConfig, seed: int, concurrent: int, drawn: list[dict[str, Any]]) -> Any:
    """Who draws the settings; Optuna begins with those that an earlier start has drawn."""
    if tune.search == "optuna":
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Optuna's ten random trials before it learns are more than many searches have in all.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, tune.samples // 3))
        return ConcurrencyLimiter(OptunaSearch(sampler=sampler, points_to_evaluate=list(drawn) or None), concurrent)
    return BasicVariantGenerator(random_state=seed, max_concurrent=concurrent)


def scheduler(tune: TuneConfig, train: TrainConfig) -> Any:
    """Who stops trials early; None if nobody does."""
    if tune.first_rung_tokens is None:
        return None
    return AsyncHyperBandScheduler(
        time_attr=TOKENS,
        max_t=2 * train.tokens,  # beyond every run: reaching the end of the budget is no reason to be stopped
        grace_period=train.eval_every_steps * train.batch_tokens,  # where the first evaluation falls, in whole batches
        reduction_factor=tune.reduction_factor,
        stop_last_trials=False,
    )


def values(where: Range) -> tuple[Any, ...]:
    """The ends of a range, or all its choices."""
    found = where.uniform or where.log or where.integer or where.log_integer or where.choice
    assert found is not None
    return found


def domain(where: Range, search: str) -> Any:
    """As Ray Tune has it."""
    if where.choice is not None:
        return ray_tune.grid_search(list(where.choice)) if search == "sweep" else ray_tune.choice(list(where.choice))
    low, high = values(where)
    if where.uniform or where.log:
        return (ray_tune.uniform if where.uniform else ray_tune.loguniform)(low, high)
    return (ray_tune.randint if where.integer else ray_tune.lograndint)(low, high + 1)
