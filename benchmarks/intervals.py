"""Measures how often the 90 % intervals contain the truth, in simulated studies with known laws and noise.

Prints one JSON line per design:

    .venv/bin/python benchmarks/intervals.py --studies 200 --resamples 200

A study has two families on one grid; a token of the second is worth four tokens of the first. Measured are the intervals of the
exponents of the first family, and of the data-efficiency factor between both laws at the middle size. A fit that fails a check,
or of which the form is a misfit, has no interval; `of` counts the intervals. Chinchilla's law is fitted, also in studies that
are simulated from another one.

CURVES are designs whose results need no law: the factor between curves at the smallest size, its growth with size, and the
differences of losses at the smallest and the largest budget. `width` is the median width of the intervals, in ln.
"""

import argparse
import json
import time

import numpy as np

from lmu_dist.scaling.compare import growth_of_factors
from lmu_dist.scaling.curve_factor import factor_with_noise
from lmu_dist.scaling.diagnostics import check_intervals, check_table, diagnose
from lmu_dist.scaling.efficiency import factor_from_laws
from lmu_dist.scaling.fit import Fit, fit
from lmu_dist.scaling.flexible_laws import EXAMPLE_FARSEER, EXAMPLE_GAMMA
from lmu_dist.scaling.intervals import Interval, parameter_intervals, resample, small_sample_correction
from lmu_dist.scaling.laws import Chinchilla, Floats, ScalingLaw
from lmu_dist.scaling.misfit import find_misfit
from lmu_dist.scaling.published import HOFFMANN
from lmu_dist.scaling.run_losses import RunLoss, group_of
from lmu_dist.scaling.table import Rows, rows_from_columns
from lmu_dist.scaling.trunk_noise import TrunkNoise, reach

TRUE_FACTOR = 4.0
# Sizes, budgets, seeds, standard deviation of ln loss, and its distribution. 0 sizes: sizes and budgets at random; -6: six
# sizes, each with budgets of 5, 20, 80 and 320 tokens per parameter. A trunk is the runs of one size and seed, which
# have half of the variance of their noise in common.
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
    "8 trunks": (4, 5, 2, 0.003, "half by trunk"),
    "12 trunks": (6, 4, 2, 0.003, "half by trunk"),
    "18 trunks": (6, 5, 3, 0.003, "half by trunk"),
    "from gamma": (6, 6, 2, 0.003, "normal"),
    "from farseer": (6, 6, 2, 0.003, "normal"),
    "from gamma, noisy": (6, 6, 2, 0.02, "normal"),
    "from farseer, noisy": (6, 6, 2, 0.02, "normal"),
}
# Sizes, budgets, seeds, share of the variance that a trunk has in common, how many times as large the noise is at the smallest
# budget as at the others, and whether budgets are tokens per parameter. The noise at the others is 0.5 %.
CURVES = {
    "curves of 1 size, all common": (1, 6, 2, 1.0, 1, False),
    "curves of 1 size, half common": (1, 6, 2, 0.5, 1, False),
    "curves of 1 size, independent": (1, 6, 2, 0.0, 1, False),
    "curves of 3 sizes, all common": (3, 6, 2, 1.0, 1, False),
    "curves of 3 sizes, half common": (3, 6, 2, 0.5, 1, False),
    "curves of 3 sizes, independent": (3, 6, 2, 0.0, 1, False),
    "noisy smallest budget, half common": (3, 3, 2, 0.5, 3, False),
    "noisy smallest budget, independent": (3, 3, 2, 0.0, 3, False),
    "tokens per parameter, half common": (4, 4, 2, 0.5, 1, True),
}
CURVE_NOISE = 0.005


def law_of(design: str) -> ScalingLaw:
    """Returns the law of the first family."""
    return EXAMPLE_GAMMA if "gamma" in design else EXAMPLE_FARSEER if "farseer" in design else HOFFMANN


def simulate(design: str, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Returns the simulated tables of the two families."""
    n_sizes, n_budgets, n_seeds, deviation, distribution = DESIGNS[design]
    if n_sizes < 0:
        n, ratio = np.meshgrid(np.logspace(7, 9, -n_sizes), 5 * 4.0 ** np.arange(n_budgets))
        n, d = np.repeat(n.ravel(), n_seeds), np.repeat((n * ratio).ravel(), n_seeds)
    elif n_sizes:
        n, d = np.meshgrid(np.logspace(6, 9, n_sizes), np.logspace(8, 11, n_budgets))
        n, d = np.repeat(n.ravel(), n_seeds), np.repeat(d.ravel(), n_seeds)
    else:
        n, d = 10 ** rng.uniform(6, 9.5, n_budgets), 10 ** rng.uniform(8, 11, n_budgets)
    tables = []
    law = law_of(design)
    for factor in (1.0, TRUE_FACTOR):
        z = rng.standard_t(3, size=len(n)) / np.sqrt(3) if distribution == "t3" else rng.normal(size=len(n))
        if distribution == "one of twenty":
            z = np.where(rng.random(len(n)) < 0.05, 10 * z, z)
        if distribution == "half by trunk":
            trunks = np.unique(labels_of(design, n), return_inverse=True)[1]
            z = np.sqrt(0.5) * (z + rng.normal(size=trunks.max() + 1)[trunks])
        tables.append(rows_from_columns(n, d, law.loss(n, factor * d) * np.exp(deviation * z)))
    return tables[0], tables[1]


def labels_of(design: str, n_params: Floats) -> list[str]:
    """Returns the group of every run: its trunk in the designs with trunks, else itself."""
    n_seeds = DESIGNS[design][2]
    if DESIGNS[design][4] != "half by trunk":
        return [str(i) for i in range(len(n_params))]
    return [f"{n:.6g}/{i % n_seeds}" for i, n in enumerate(n_params.tolist())]


def fit_if_checks_pass(rows: Rows, labels: list[str]) -> Fit | None:
    """Returns the fit, or None if it fails a check or its form is a misfit."""
    if check_table(Chinchilla, rows):
        return None
    fitted = fit(Chinchilla, rows)
    return fitted if diagnose(fitted, rows).passed and not find_misfit(fitted, rows, labels).reasons else None


def contains(interval: tuple[float, float] | None, truth: float) -> bool | None:
    """Returns whether an interval contains the truth; None if there is no interval."""
    return None if interval is None else interval[0] <= truth <= interval[1]


def simulate_study(design: str, seed: int, n_resamples: int) -> dict[str, bool | None]:
    """Simulates one study and returns which of its intervals contain the truth."""
    tables = simulate(design, np.random.default_rng(seed))
    labels = labels_of(design, tables[0].n_params)
    fits = [fit_if_checks_pass(rows, labels) for rows in tables]
    base, new = fits
    if base is None or new is None:
        return {"alpha": None, "beta": None, "factor": None}
    laws = [resample(fitted, rows, labels, n_resamples, seed) for fitted, rows in zip((base, new), tables, strict=True)]
    correction = small_sample_correction(base, tables[0], labels)
    intervals = parameter_intervals(base.law, laws[0], correction)
    if any(
        check_intervals(parameter_intervals(f.law, resampled_laws, correction), Chinchilla)
        for f, resampled_laws in zip((base, new), laws, strict=True)
    ):
        return {"alpha": None, "beta": None, "factor": None}
    token_range = (float(tables[0].tokens.min()), float(tables[0].tokens.max()))
    middle_size = float(np.exp(np.log(tables[0].n_params).mean()))
    pairs, ranges = list(zip(*laws, strict=True)), (token_range, token_range)
    factor = factor_from_laws(base.law, new.law, middle_size, ranges, pairs, correction)  # pyright: ignore
    exponents = law_of(design) == HOFFMANN  # those of another form are other quantities
    return {
        "alpha": contains(intervals.get("alpha"), HOFFMANN.alpha) if exponents else None,
        "beta": contains(intervals.get("beta"), HOFFMANN.beta) if exponents else None,
        "factor": contains(factor.interval, TRUE_FACTOR),
    }


def simulate_losses(design: str, rng: np.random.Generator) -> list[RunLoss]:
    """Returns the runs of a study of curves: families `base` and `new`."""
    n_sizes, n_budgets, n_seeds, shared, smallest, per_param = CURVES[design]
    sizes, steps = np.logspace(6, 7.5, n_sizes).round(), TRUE_FACTOR ** np.arange(n_budgets)
    deviation, losses = CURVE_NOISE * np.array([smallest, *[1] * (n_budgets - 1)]), list[RunLoss]()
    for family, worth in (("base", 1.0), ("new", TRUE_FACTOR)):
        for n in sizes.tolist():
            tokens = (5 * n * steps if per_param else 1e8 * steps).round()
            expected = HOFFMANN.loss(n, worth * tokens)
            for seed in range(n_seeds):
                z = np.sqrt(shared) * rng.normal() + np.sqrt(1 - shared) * rng.normal(size=n_budgets)
                group = group_of(family, int(n), seed)
                found = (expected * np.exp(deviation * z)).tolist()
                losses += [RunLoss(family, int(n), int(d), y, group) for d, y in zip(tokens.tolist(), found, strict=True)]
    return losses


def simulate_curves(design: str, seed: int) -> dict[str, tuple[Interval, float]]:
    """Simulates one study of curves; returns its intervals with the truth."""
    losses = simulate_losses(design, np.random.default_rng(seed))
    noise, sizes = TrunkNoise(losses), sorted({run.n_params for run in losses})
    at_sizes = [[[r for r in losses if (r.family, r.n_params) == (f, n)] for f in ("base", "new")] for n in sizes]
    factors = [factor_with_noise(base, new, noise)[0] for base, new in at_sizes]
    intervals = dict[str, tuple[Interval, float]]()
    if factors[0].interval:
        intervals["factor"] = factors[0].interval, TRUE_FACTOR
    if growth := growth_of_factors(list(zip(sizes, factors, strict=True))):
        intervals["growth"] = growth[1], 1.0
    for name, choose in (("smallest budget", min), ("largest budget", max)):
        tokens = choose(run.tokens for run in at_sizes[0][0])
        means = [np.mean([np.log(r.loss) for r in runs if r.tokens == tokens]) for runs in at_sizes[0]]
        n_seeds = CURVES[design][2]
        of_run = noise.at(tokens, sizes[0])
        assert of_run is not None
        found, apart = float(means[0] - means[1]), reach(of_run) * np.sqrt(2 / n_seeds)
        truth = float(HOFFMANN.loss(sizes[0], tokens) / HOFFMANN.loss(sizes[0], TRUE_FACTOR * tokens))
        intervals[name] = (float(np.exp(found - apart)), float(np.exp(found + apart))), truth
    return intervals


def measure_curves(design: str, n_studies: int) -> dict[str, dict[str, float]]:
    """Returns by result the share of intervals that contain the truth, their number, and their median width."""
    studies, measured = [simulate_curves(design, seed) for seed in range(n_studies)], dict[str, dict[str, float]]()
    for name in studies[0]:
        found = [study[name] for study in studies if name in study]
        covered = float(np.mean([low <= truth <= high for (low, high), truth in found]))
        width = float(np.median([np.log(high / low) for (low, high), _ in found]))
        measured[name] = {"covered": round(covered, 3), "of": len(found), "width": round(width, 4)}
    return measured


def main() -> None:
    """Runs the selected designs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--designs", nargs="*", default=[*DESIGNS, *CURVES], choices=[*DESIGNS, *CURVES])
    arguments = parser.parse_args()
    for design in arguments.designs:
        started_at = time.monotonic()
        if design in CURVES:
            print(json.dumps({"design": design, **measure_curves(design, arguments.studies)}), flush=True)
            continue
        studies = [simulate_study(design, seed, arguments.resamples) for seed in range(arguments.studies)]
        covered = {}
        for name in ("alpha", "beta", "factor"):
            known = [bool(f[name]) for f in studies if f[name] is not None]
            covered[name] = {"covered": round(float(np.mean(known)), 3) if known else None, "of": len(known)}
        print(json.dumps({"design": design, **covered, "seconds": round(time.monotonic() - started_at)}), flush=True)


if __name__ == "__main__":
    main()
