"""Counts how often a comparison of laws excludes the law that a table was simulated from. Prints one JSON line per grid:

    .venv/bin/python benchmarks/true_law.py --tables 40 chinchilla,5x4,0.01 gamma,6x6,0.002

A grid is LAW,SIZESxBUDGETS,NOISE; noise is that of ln L, normal and independent. Sizes are from 1e7 to 1e9 and budgets from
2e8 to 2e10 tokens; for gamma and farseer, whose parameters are of larger models, 1e8 to 6e9 and 1e9 to 1e11. Counted are the
tables in which the true law passes its checks and fits, of these the ones that do not support it, and all that support
Chinchilla's law or choose farseer.
"""

import argparse
import json
import time

import numpy as np

from lmu_dist.scaling.compare_laws import compare_laws
from lmu_dist.scaling.flexible_laws import EXAMPLE_FARSEER, EXAMPLE_GAMMA, Gamma
from lmu_dist.scaling.forms import law_name
from lmu_dist.scaling.laws import Gadre, ScalingLaw
from lmu_dist.scaling.published import HOFFMANN
from lmu_dist.scaling.table import Rows, rows_from_columns

LAWS: dict[str, ScalingLaw] = {
    "chinchilla": HOFFMANN,
    "gadre": Gadre(E=1.7, a=150.0, b=300.0, eta=-0.26),
    "gamma": EXAMPLE_GAMMA,
    "gamma 0.7": Gamma(E=1.2, A=1500.0, B=8000.0, alpha=0.36, beta=0.40, gamma=0.7),
    "farseer": EXAMPLE_FARSEER,
}
RANGES = ((1e7, 1e9), (2e8, 2e10))
FLEXIBLE_RANGES = ((1e8, 6e9), (1e9, 1e11))


def simulate(name: str, n_sizes: int, n_budgets: int, noise: float, seed: int) -> Rows:
    """Returns a grid of runs of a law with noise."""
    sizes, budgets = RANGES if name in ("chinchilla", "gadre") else FLEXIBLE_RANGES
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(*sizes, n_sizes), np.geomspace(*budgets, n_budgets)))
    return rows_from_columns(n, d, LAWS[name].loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n))))


def main() -> None:
    """Runs the grids."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=40)
    parser.add_argument("grids", nargs="+", metavar="LAW,SIZESxBUDGETS,NOISE")
    arguments = parser.parse_args()
    for text in arguments.grids:
        name, grid, noise = text.split(",")
        n_sizes, n_budgets = (int(count) for count in grid.split("x"))
        started_at, counts = (
            time.process_time(),
            dict.fromkeys(("fits", "excluded", "chinchilla supported", "farseer chosen"), 0),
        )
        for seed in range(arguments.tables):
            comparison = compare_laws(simulate(name, n_sizes, n_budgets, float(noise), seed), holdouts=False)
            supported = [c.name for c in comparison.supported]
            true = next(c for c in comparison.candidates if c.name == law_name(type(LAWS[name])))
            counts["fits"] += true.fits
            counts["excluded"] += true.fits and true.name not in supported
            counts["chinchilla supported"] += "chinchilla" in supported
            counts["farseer chosen"] += supported[:1] == ["farseer"]
        seconds = round((time.process_time() - started_at) / arguments.tables, 2)
        print(json.dumps({"grid": text, "tables": arguments.tables, **counts, "CPU seconds per table": seconds}), flush=True)


if __name__ == "__main__":
    main()
