"""What a grid could tell: a ladder configuration in, the intervals out that its fits would have if assumed laws were true.

Losses of the planned cells are drawn from plan.law with plan.noise, fitted as the real ones will be, many times over; the
spread of the answers is the precision the money buys. Simulated fits start at the assumed law, to be quick: a grid so poor that
a fit from elsewhere finds another optimum is not told from a better one.
"""

from dataclasses import dataclass, replace

import numpy as np

from lmu_dist.config import Config
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import Planned, grid
from lmu_dist.scaling.fit import refit
from lmu_dist.scaling.laws import Chinchilla, Floats
from lmu_dist.scaling.table import rows_from_columns

SIMULATIONS = 100
INTERVAL = (5.0, 95.0)  # percentiles
FEWEST = 6  # cells of a family


@dataclass(frozen=True)
class Power:
    """90 % intervals of what would be estimated; empty where the grid cannot tell, with the reason in `remarks`."""

    assumed: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    remarks: tuple[str, ...]
    n_simulations: int

    def lines(self) -> list[str]:
        """For people."""
        names = {
            "alpha": "exponent of N (alpha)",
            "beta": "exponent of D (beta)",
            "efficiency_factor": "token-efficiency factor",
        }
        told = [
            f"power: {names[key]}, assumed {self.assumed[key]:g}, would come out between {low:.3g} and {high:.3g} (90 %)"
            for key, (low, high) in self.intervals.items()
        ]
        return told + [f"power: {remark}" for remark in self.remarks]


def power(config: Config, seed: int = 0) -> Power:
    """Simulates the planned grid; nothing is told of a configuration without one. Raises ConfigError, as `grid` does."""
    if config.ladder is None:
        return Power({}, {}, (), 0)
    cells, _ = grid(config, vocab_tokens(config))
    assumed, factor = config.plan.law, config.plan.efficiency_factor
    base = Chinchilla(E=assumed.E, A=assumed.A, B=assumed.B, alpha=assumed.alpha, beta=assumed.beta)
    better = replace(base, B=base.B * factor**-base.beta)
    given = {"alpha": base.alpha, "beta": base.beta, "efficiency_factor": factor, "noise": config.plan.noise}
    families = {cell.shape.family for cell in cells}
    baseline = config.plan.baseline if config.plan.baseline in families else min(families, default=config.plan.baseline)
    base_grid = _points(cells, baseline)
    others = sorted(families - {baseline})
    if len(base_grid) < FEWEST or len(set(base_grid[:, 0])) < 3 or len(set(base_grid[:, 1])) < 3:
        said = f"{len(base_grid)} cells of {baseline} cannot determine a law of five parameters; three sizes, three budgets can"
        return Power(given, {}, (said,), 0)
    other_grid = _points(cells, others[0]) if others else base_grid[:0]
    point, remark = _point_of_comparison(base_grid, other_grid, base, factor)
    remarks = [f"of {others[0]} against {baseline}: {remark}"] if others and remark else []
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"alpha": [], "beta": [], "efficiency_factor": []}
    failed = 0
    for _ in range(SIMULATIONS):
        try:
            fitted = _draw_and_fit(base_grid, base, config.plan.noise, rng)
            found["alpha"].append(fitted.alpha)
            found["beta"].append(fitted.beta)
            if point is not None:
                other = _draw_and_fit(other_grid, better, config.plan.noise, rng)
                found["efficiency_factor"].append(_factor(fitted, other, *point))
        except (ValueError, FloatingPointError):
            failed += 1
    if failed:
        remarks.append(f"{failed} of {SIMULATIONS} simulated grids gave no fit")
    intervals = {}
    for key, values in found.items():
        known = [v for v in values if np.isfinite(v)]
        if values and len(known) >= 0.9 * SIMULATIONS:
            low, high = np.percentile(known, INTERVAL)
            intervals[key] = (float(low), float(high))
        elif values:
            remarks.append(f"{key} is not determined in {SIMULATIONS - len(known)} of {SIMULATIONS} simulated grids")
    return Power(given, intervals, tuple(remarks), SIMULATIONS)


def _points(cells: list[Planned], family: str) -> Floats:
    """N and D of a family's cells, as rows."""
    rows = [(c.config.model.n_params, c.trained_tokens) for c in cells if c.shape.family == family]
    return np.array(rows, np.float64).reshape(-1, 2)


def _point_of_comparison(
    base_grid: Floats, other_grid: Floats, base: Chinchilla, factor: float
) -> tuple[tuple[float, float] | None, str]:
    """(N, loss) in the middle of what both families would show at the middle size; (None, why) if there is none."""
    sizes = sorted(set(base_grid[:, 0]) & set(other_grid[:, 0]))
    if not sizes:
        return None, "they have no size in common"
    n = sizes[len(sizes) // 2]
    seen, others = base_grid[base_grid[:, 0] == n, 1], other_grid[other_grid[:, 0] == n, 1]
    # A loss that the other reaches with D tokens takes the baseline factor x D.
    low, high = max(seen.min(), factor * others.min()), min(seen.max(), factor * others.max())
    if low > high:
        return None, (
            f"at N = {n:,.0f} no loss is reached by both, if the factor is {factor:g}: budgets span {seen.min():.2g} to "
            f"{seen.max():.2g} tokens, and must span more than that factor"
        )
    return (n, float(base.loss(n, np.sqrt(low * high)))), ""


def _draw_and_fit(points: Floats, law: Chinchilla, noise: float, rng: np.random.Generator) -> Chinchilla:
    loss = law.loss(points[:, 0], points[:, 1]) * np.exp(rng.normal(0.0, noise, len(points)))
    fitted = refit(law, rows_from_columns(points[:, 0], points[:, 1], loss)).law
    assert isinstance(fitted, Chinchilla)
    return fitted


def _factor(base: Chinchilla, other: Chinchilla, n_params: float, loss: float) -> float:
    return float(base.tokens_for(loss, n_params) / other.tokens_for(loss, n_params))
