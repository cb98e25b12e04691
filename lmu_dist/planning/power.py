"""Statistical power of a grid: the intervals that its fits would have if the assumed scaling laws were true.

The losses of the planned cells are simulated many times from plan.law with noise plan.noise, and fitted as the real losses will
be. The spread of the estimates is the precision that the grid can reach. To save time, every simulated fit starts at the
assumed law. The simulation therefore does not notice that a fit of a poor grid can end in another optimum from another start.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from lmu_dist.config import Config
from lmu_dist.models import registry
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import GridCell, grid
from lmu_dist.scaling.appearance import family_order
from lmu_dist.scaling.fit import refit_simulated
from lmu_dist.scaling.laws import Chinchilla, Floats
from lmu_dist.scaling.pair import Pair, choose_pair
from lmu_dist.scaling.table import rows_from_columns

SIMULATIONS = 100
INTERVAL_PERCENTILES = (5.0, 95.0)
MIN_CELLS = 6  # of the baseline family, to fit a law


@dataclass(frozen=True)
class PowerEstimate:
    """90 % intervals of the estimates that the grid would give. `remarks` has the reason for every interval that is missing."""

    assumed: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    remarks: tuple[str, ...]
    n_simulations: int

    def lines(self) -> list[str]:
        """The estimate as lines of text."""
        names = {
            "alpha": "exponent of N (alpha)",
            "beta": "exponent of D (beta)",
            "efficiency_factor": "token-efficiency factor",
        }
        intervals = [
            f"power: {names[key]}, assumed {self.assumed[key]:g}, would be estimated between {low:.3g} and {high:.3g} (90 %)"
            for key, (low, high) in self.intervals.items()
        ]
        return intervals + [f"power: {remark}" for remark in self.remarks]


def estimate_power(config: Config, seed: int = 0) -> PowerEstimate:
    """Simulates the grid of a ladder. Without a ladder the estimate is empty. Raises ConfigError, as `grid` does."""
    if config.ladder is None:
        return PowerEstimate({}, {}, (), 0)
    cells, _ = grid(config, vocab_tokens(config))
    law, factor = config.plan.law, config.plan.efficiency_factor
    base_law = Chinchilla(E=law.E, A=law.A, B=law.B, alpha=law.alpha, beta=law.beta)
    other_law = replace(base_law, B=base_law.B * factor**-base_law.beta)
    assumed = {"alpha": law.alpha, "beta": law.beta, "efficiency_factor": factor, "noise": config.plan.noise}
    n_cells = Counter(sorted((cell.shape.family for cell in cells), key=family_order))
    named = registry.find(config.plan.baseline).name
    pair = choose_pair(n_cells, planned=named) if len(n_cells) > 1 else Pair(min(n_cells, default=named), "")
    baseline, others = pair.base, [pair.new] if pair.new else []
    base_grid = _sizes_and_tokens(cells, baseline)
    if len(base_grid) < MIN_CELLS or len(set(base_grid[:, 0])) < 3 or len(set(base_grid[:, 1])) < 3:
        remark = (
            f"{len(base_grid)} cells of {baseline} cannot determine a law of five parameters; "
            f"use at least {MIN_CELLS} cells, with three sizes and three token budgets"
        )
        return PowerEstimate(assumed, {}, (remark,), 0)
    other_grid = _sizes_and_tokens(cells, others[0]) if others else base_grid[:0]
    point, remark = _comparison_point(base_grid, other_grid, base_law, factor)
    remarks = [f"no token-efficiency factor of {others[0]} against {baseline}: {remark}"] if others and remark else []
    estimates: dict[str, list[float]] = {"alpha": [], "beta": [], "efficiency_factor": []}
    other_grid = other_grid if point is not None else other_grid[:0]
    noise = np.random.default_rng(seed).normal(0.0, config.plan.noise, (SIMULATIONS, len(base_grid) + len(other_grid)))
    fitted = _simulate_and_fit(base_grid, base_law, noise[:, : len(base_grid)])
    compared = _simulate_and_fit(other_grid, other_law, noise[:, len(base_grid) :]) if point is not None else fitted
    for base, other in zip(fitted, compared, strict=True):
        if base is not None:
            estimates["alpha"].append(base.alpha)
            estimates["beta"].append(base.beta)
        if base is not None and other is not None and point is not None:
            estimates["efficiency_factor"].append(_efficiency_factor(base, other, *point))
    n_failed = sum(base is None or other is None for base, other in zip(fitted, compared, strict=True))
    if n_failed:
        remarks.append(f"the fit failed for {n_failed} of {SIMULATIONS} simulated grids")
    intervals = {}
    for key, values in estimates.items():
        finite = [v for v in values if np.isfinite(v)]
        if values and len(finite) >= 0.9 * SIMULATIONS:
            low, high = np.percentile(finite, INTERVAL_PERCENTILES)
            intervals[key] = (float(low), float(high))
        elif values:
            remarks.append(f"{key} is not determined in {SIMULATIONS - len(finite)} of {SIMULATIONS} simulated grids")
    return PowerEstimate(assumed, intervals, tuple(remarks), SIMULATIONS)


def _sizes_and_tokens(cells: list[GridCell], family: str) -> Floats:
    """One row (N, D) for each cell of a family."""
    rows = [(c.config.model.n_params, c.trained_tokens) for c in cells if c.shape.family == family]
    return np.array(rows, np.float64).reshape(-1, 2)


def _comparison_point(
    base_grid: Floats, other_grid: Floats, base_law: Chinchilla, factor: float
) -> tuple[tuple[float, float] | None, str]:
    """The size N and the loss at which two families are compared, or None and the reason why there is no such point.

    N is the middle one of the common sizes. The loss is in the middle of the losses that both families reach at this size.
    """
    sizes = sorted(set(base_grid[:, 0]) & set(other_grid[:, 0]))
    if not sizes:
        return None, "they have no size in common"
    n = sizes[len(sizes) // 2]
    base_tokens, other_tokens = base_grid[base_grid[:, 0] == n, 1], other_grid[other_grid[:, 0] == n, 1]
    # The baseline needs factor x D tokens for a loss that the other family reaches with D tokens.
    low = max(base_tokens.min(), factor * other_tokens.min())
    high = min(base_tokens.max(), factor * other_tokens.max())
    if low > high:
        return None, (
            f"if the factor is {factor:g}, no loss at N = {n:,.0f} is reached by both. The token budgets span "
            f"{base_tokens.min():.2g} to {base_tokens.max():.2g} tokens and must span more than that factor"
        )
    return (n, float(base_law.loss(n, np.sqrt(low * high)))), ""


def _simulate_and_fit(points: Floats, law: Chinchilla, noise: Floats) -> list[Chinchilla | None]:
    """The law fitted to every simulation of a grid: one for each row of `noise` (simulations, cells), which is added to ln L.

    None where a simulated loss overflows.
    """
    expected = law.loss(points[:, 0], points[:, 1])
    with np.errstate(over="ignore", under="ignore"):
        losses = expected * np.exp(noise)
    usable = np.all(np.isfinite(losses) & (losses > 0), axis=1)
    fitted = list[Chinchilla | None]([None] * len(losses))
    found = refit_simulated(law, rows_from_columns(points[:, 0], points[:, 1], expected), losses[usable])
    for i, law_found in zip(np.flatnonzero(usable), found, strict=True):
        assert isinstance(law_found, Chinchilla)
        fitted[i] = law_found
    return fitted


def _efficiency_factor(base: Chinchilla, other: Chinchilla, n_params: float, loss: float) -> float:
    return float(base.tokens_for(loss, n_params) / other.tokens_for(loss, n_params))
