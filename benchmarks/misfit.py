"""Measures whether wrong forms are noticed, and how good forecasts are, on tables simulated from known laws.

Prints one JSON line per law:

    .venv/bin/python benchmarks/misfit.py --tables 100 --resamples 200

A table has 404 runs, sizes from 1e8 to 6e9, 1 to 50 tokens per parameter (at random, in logarithms) and 0.2 % noise.
Counted are the tables on which Chinchilla's law is marked as a misfit, and on which it is chosen or tied in a comparison of
all laws. Forecast are 20 runs with up to four times the largest N: the median of their absolute errors, and the share of their
losses, with noise, within the 90 % interval.
"""

import argparse
import json
import time

import numpy as np

from lmu_dist.scaling.compare_laws import compare_laws
from lmu_dist.scaling.flexible_laws import EXAMPLE_FARSEER, EXAMPLE_GAMMA, Gamma
from lmu_dist.scaling.forecast import predict_from
from lmu_dist.scaling.laws import ScalingLaw
from lmu_dist.scaling.published import HOFFMANN
from lmu_dist.scaling.table import Rows, rows_from_columns

NOISE, N_RUNS, N_HELD_OUT = 0.002, 404, 20
SIZES, RATIOS, EXTRAPOLATION = (1e8, 6e9), (1.0, 50.0), 4.0
LAWS: dict[str, ScalingLaw] = {
    "gamma": EXAMPLE_GAMMA,
    "gamma 0.7": Gamma(E=1.2, A=1500.0, B=8000.0, alpha=0.36, beta=0.40, gamma=0.7),
    "farseer": EXAMPLE_FARSEER,
    "chinchilla": HOFFMANN,
}


def simulate(law: ScalingLaw, rng: np.random.Generator, n_runs: int, sizes: tuple[float, float]) -> Rows:
    """Returns a table of runs of a law with noise; sizes are at random between two limits."""
    n = np.exp(rng.uniform(np.log(sizes[0]), np.log(sizes[1]), n_runs))
    d = n * np.exp(rng.uniform(np.log(RATIOS[0]), np.log(RATIOS[1]), n_runs))
    return rows_from_columns(n, d, law.loss(n, d) * np.exp(rng.normal(0, NOISE, n_runs)))


def simulate_table(law: ScalingLaw, seed: int, n_resamples: int) -> dict[str, float | bool]:
    """Simulates one table and returns what the comparison and the forecast say."""
    rng = np.random.default_rng(seed)
    rows = simulate(law, rng, N_RUNS, SIZES)
    large = simulate(law, rng, N_HELD_OUT, (SIZES[1], EXTRAPOLATION * SIZES[1]))
    comparison = compare_laws(rows, holdouts=False)
    chinchilla = next(c for c in comparison.candidates if c.name == "chinchilla")
    forecast = predict_from(comparison, large.n_params, large.tokens, n_resamples=n_resamples)
    inside = (forecast.low <= large.loss) & (large.loss <= forecast.high)
    return {
        "misfit": bool(chinchilla.misfit and chinchilla.misfit.reasons),
        "chinchilla tied": chinchilla.supported,
        "none": comparison.chosen is None,
        "error": float(np.median(np.abs(forecast.loss / large.loss - 1))),
        "covered": float(inside.mean()),
        "width": float(np.median(forecast.high / forecast.low - 1)),
        "laws": ",".join(forecast.laws),  # pyright: ignore
    }


def main() -> None:
    """Runs the selected laws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=100)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--laws", nargs="*", default=list(LAWS), choices=list(LAWS))
    parser.add_argument("--each", action="store_true", help="print every table")
    arguments = parser.parse_args()
    for name in arguments.laws:
        started_at = time.process_time()
        tables = list[dict[str, float | bool]]()
        for seed in range(arguments.tables):
            tables.append(simulate_table(LAWS[name], seed, arguments.resamples))
            if arguments.each:
                print(json.dumps(tables[-1]), flush=True)
        known = [t for t in tables if not t["none"]]
        facts = {
            "law": name,
            "tables": len(tables),
            "misfit": sum(bool(t["misfit"]) for t in tables),
            "chinchilla tied": sum(bool(t["chinchilla tied"]) for t in tables),
            "no law": len(tables) - len(known),
            "median error": round(float(np.median([t["error"] for t in known])), 5),
            "covered": round(float(np.mean([t["covered"] for t in known])), 3),
            "median width": round(float(np.median([t["width"] for t in known])), 5),
            "CPU seconds": round(time.process_time() - started_at),
        }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
