"""Translates a TuneConfig into Ray Tune's search space, search algorithm and scheduler. For launch/tune."""

from typing import Any

import optuna
from ray import tune as ray_tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from lmu_dist.config import Range, TrainConfig, TuneConfig
from lmu_dist.launch.tune_report import TOKENS


def settings(params: dict[str, Any]) -> dict[str, Any]:
    """The sampled settings, with numbers rounded to four digits: more digits of a learning rate do not matter."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in params.items()}


def searcher(tune: TuneConfig, seed: int, max_concurrent: int, samples: list[dict[str, Any]]) -> Any:
    """The search algorithm. Optuna starts with the `samples` of earlier starts of the search."""
    if tune.search == "optuna":
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # By default TPE starts with ten random trials, and many searches have fewer trials in total.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, tune.samples // 3))
        return ConcurrencyLimiter(OptunaSearch(sampler=sampler, points_to_evaluate=list(samples) or None), max_concurrent)
    return BasicVariantGenerator(random_state=seed, max_concurrent=max_concurrent)


def scheduler(tune: TuneConfig, train: TrainConfig) -> Any:
    """The ASHA scheduler, which stops trials early; None if tune.first_rung_tokens is not set."""
    if tune.first_rung_tokens is None:
        return None
    return AsyncHyperBandScheduler(
        time_attr=TOKENS,
        max_t=2 * train.tokens,  # beyond the budget, so that ASHA does not stop a trial that reaches its end
        grace_period=train.eval_every_steps * train.batch_tokens,  # the first evaluation, in whole batches
        reduction_factor=tune.reduction_factor,
        stop_last_trials=False,
    )


def values(search_range: Range) -> tuple[Any, ...]:
    """The two ends of a range, or all its choices."""
    r = search_range
    found = r.uniform or r.log or r.integer or r.log_integer or r.choice
    assert found is not None
    return found


def domain(search_range: Range, search: str) -> Any:
    """A range as a search domain of Ray Tune."""
    if search_range.choice is not None:
        choices = list(search_range.choice)
        return ray_tune.grid_search(choices) if search == "sweep" else ray_tune.choice(choices)
    low, high = values(search_range)
    if search_range.uniform or search_range.log:
        return (ray_tune.uniform if search_range.uniform else ray_tune.loguniform)(low, high)
    return (ray_tune.randint if search_range.integer else ray_tune.lograndint)(low, high + 1)
