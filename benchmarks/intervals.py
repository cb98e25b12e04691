"""How often the 90 % intervals hold the truth: studies with known laws and noise, fitted as real ones are. Prints one JSON
line each.

    .venv/bin/python benchmarks/intervals.py --studies 200 --resamples 200

A study is two families on one grid, the second with its tokens worth four times as much. Asked for: the exponents of the
first, and the data-efficiency factor between both laws at the middle size. A fit without a certificate has no interval and
is counted apart.
"""

import argparse
import json
import time
from dataclasses import replace

import numpy as np

from lmu_dist.scaling.certificate import certify, too_wide, unfit
from lmu_dist.scaling.efficiency import from_laws
from lmu_dist.scaling.fit import Fit, fit
from lmu_dist.scaling.intervals import of_parameters, resampled, weights, widening
from lmu_dist.scaling.laws import HOFFMANN, Chinchilla
from lmu_dist.scaling.table import Rows, rows_of

FACTOR = 4.0
# Sizes, budgets, seeds, deviation of ln loss, and its shape. No sizes: sizes and budgets at random; minus six: of each of six
# sizes budgets of 5, 20, 80, 320 tokens per parameter.
DESIGNS = {
    "7x7": (7, 7, 1, 0.01, "normal"),
    "5x4": (5, 4, 1, 0.005, "normal"),
    "4x3": (4, 3, 1, 0.005, "normal"),
    "5x5 exact": (5, 5, 1, 0.0005, "normal"),
    "7x7 heavy tails": (7, 7, 1, 0.005, "t3"),
    "6x6 2 seeds": (6, 6, 2, 0.02, "normal"),
    "240 scattered": (0, 240, 1, 0.003, "normal"),
    "ladder": (-6, 4, 2, 0.004, "normal"),
    "outliers": (6, 6, 1, 0.004, "one of twenty"),
}


def simulate(design: str, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """The tables of the two families."""
    n_sizes, n_budgets, n_seeds, deviation, shape = DESIGNS[design]
    if n_sizes < 0:
        n, ratio = np.meshgrid(np.logspace(7, 9, -n_sizes), 5 * 4.0 ** np.arange(n_budgets))
        n, d = np.repeat(n.ravel(), n_seeds), np.repeat((n * ratio).ravel(), n_seeds)
    elif n_sizes:
        n, d = np.meshgrid(np.logspace(6, 9, n_sizes), np.logspace(8, 11, n_budgets))
        n, d = np.repeat(n.ravel(), n_seeds), np.repeat(d.ravel(), n_seeds)
    else:
        n, d = 10 ** rng.uniform(6, 9.5, n_budgets), 10 ** rng.uniform(8, 11, n_budgets)
    tables = []
    for law in (HOFFMANN, better()):
        z = rng.standard_t(3, size=len(n)) / np.sqrt(3) if shape == "t3" else rng.normal(size=len(n))
        if shape == "one of twenty":
            z = np.where(rng.random(len(n)) < 0.05, 10 * z, z)
        tables.append(rows_of(n, d, law.loss(n, d) * np.exp(deviation * z)))
    return tables[0], tables[1]


def better() -> Chinchilla:
    """The law whose tokens are worth FACTOR."""
    return replace(HOFFMANN, B=HOFFMANN.B * FACTOR**-HOFFMANN.beta)


def certified(rows: Rows) -> Fit | None:
    """The fit, if it may be shown."""
    if unfit(Chinchilla, rows):
        return None
    found = fit(Chinchilla, rows)
    return found if certify(found, rows).ok else None


def holds(interval: tuple[float, float] | None, truth: float) -> bool | None:
    """Whether an interval covers; None without one."""
    return None if interval is None else interval[0] <= truth <= interval[1]


def study(design: str, seed: int, n_resamples: int) -> dict[str, bool | None]:
    """One simulated study: what its intervals hold."""
    tables = simulate(design, np.random.default_rng(seed))
    fits = [certified(rows) for rows in tables]
    base, new = fits
    if base is None or new is None:
        return {"alpha": None, "beta": None, "factor": None}
    drawn = weights([str(i) for i in range(len(tables[0]))], n_resamples, seed)
    laws = [resampled(found, rows, drawn) for found, rows in zip((base, new), tables, strict=True)]
    widen = widening(base, tables[0], len(tables[0]))
    ends = of_parameters(base.law, laws[0], widen)
    if any(
        too_wide(of_parameters(f.law, drawn_laws, widen), Chinchilla) for f, drawn_laws in zip((base, new), laws, strict=True)
    ):
        return {"alpha": None, "beta": None, "factor": None}
    seen = (float(tables[0].tokens.min()), float(tables[0].tokens.max()))
    middle = float(np.exp(np.log(tables[0].n_params).mean()))
    factor = from_laws(base.law, new.law, middle, (seen, seen), list(zip(*laws, strict=True)), widen)  # pyright: ignore
    return {
        "alpha": holds(ends.get("alpha"), HOFFMANN.alpha),
        "beta": holds(ends.get("beta"), HOFFMANN.beta),
        "factor": holds(factor.interval, FACTOR),
    }


def main() -> None:
    """Runs the designs asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--designs", nargs="*", default=list(DESIGNS), choices=list(DESIGNS))
    asked = parser.parse_args()
    for design in asked.designs:
        began = time.monotonic()
        found = [study(design, seed, asked.resamples) for seed in range(asked.studies)]
        covered = {}
        for name in ("alpha", "beta", "factor"):
            known = [bool(f[name]) for f in found if f[name] is not None]
            covered[name] = {"covered": round(float(np.mean(known)), 3) if known else None, "of": len(known)}
        print(json.dumps({"design": design, **covered, "seconds": round(time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main()
