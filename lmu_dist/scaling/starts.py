"""Start points of a fit: a law and a table in, laws near the best ones out.

For given exponents the prefactors are a linear least-squares problem (variable projection), so only exponents are searched.
Laws with more parameters start from the optimum of the law that they generalise.
"""

from collections.abc import Iterator

import numpy as np
from scipy.optimize import nnls

from lmu_dist.scaling.flexible_laws import EXAMPLE_FARSEER, Farseer, Gamma
from lmu_dist.scaling.laws import SQRT_SIX, Chinchilla, Floats, Gadre, Kaplan, ScalingLaw
from lmu_dist.scaling.minimise import minimise
from lmu_dist.scaling.objective import Objective, huber, log_residuals
from lmu_dist.scaling.repeated import Overfitted, Repeated
from lmu_dist.scaling.table import Rows

EXPONENT_GRID = np.linspace(0.05, 1.2, 24)  # start points are chosen from this grid
PUBLISHED_EXPONENTS: dict[type[ScalingLaw], tuple[float, float]] = {
    Chinchilla: (0.34, 0.28),
    Gadre: (0.26, 0.26),
    Kaplan: (0.103, 0.738),
}  # a start
N_STARTS = 5


def start_laws(form: type[ScalingLaw], rows: Rows) -> list[ScalingLaw]:
    """Returns the start points of a law on a table, in plain units."""
    if form in PUBLISHED_EXPONENTS:
        return _projected_starts(form, rows)
    if form is Repeated or form is Overfitted:
        return list(_repeated_starts(form, rows))
    chinchilla = _best_chinchilla(rows)
    return list(_gamma_starts(chinchilla) if form is Gamma else _farseer_starts(chinchilla, rows))


def _best_chinchilla(rows: Rows) -> Chinchilla:
    objective = Objective(Chinchilla, rows)
    vectors = np.array([objective.vector(start) for start in _projected_starts(Chinchilla, rows)])
    found = minimise(objective, vectors, tolerance=1e-3)
    best = objective.law(found.vectors[int(np.argmin(found.values))])
    assert isinstance(best, Chinchilla)
    return best


def _gamma_starts(law: Chinchilla) -> Iterator[Gamma]:
    """Yields laws that have the terms of Chinchilla's law where either of them dominates."""
    for gamma in (0.3, 0.5, 0.7, 1.0, 1.5):
        yield Gamma(law.E, law.A ** (1 / gamma), law.B ** (1 / gamma), law.alpha / gamma, law.beta / gamma, gamma)


def _farseer_starts(law: Chinchilla, rows: Rows) -> Iterator[Farseer]:
    """Yields laws close to Chinchilla's in the table, with the token term bent in several ways, and one of plausible values."""
    middle = float(np.exp(np.log(rows.n_params).mean()))
    of_n = law.A * middle**-law.alpha
    value, slope = float(np.log(law.E + of_n)), float(-law.alpha * of_n / (law.E + of_n))
    for curvature, bend in ((-0.3, 0.0), (-0.1, 0.1), (-0.1, -0.1), (0.1, 0.0), (0.1, -0.2)):
        s1 = bend * 0.5
        scaled = np.array([np.log(law.beta), s1, 0.1, np.log(law.B) - 24 * law.beta, 0.0, -0.1, value, slope, curvature])
        yield Farseer.from_coordinates(scaled).rescaled(middle, 1.0)
    yield EXAMPLE_FARSEER


def _repeated_starts(form: type[ScalingLaw], rows: Rows) -> Iterator[ScalingLaw]:
    """Yields laws from a fit to the runs that repeat their data least, with several numbers of useful repetitions."""
    unique = rows.unique_tokens if rows.unique_tokens is not None else rows.tokens
    readings = rows.tokens / unique
    few = readings <= max(4.0, float(np.median(readings)))
    laws = [_best_chinchilla(rows.where(few)), _best_chinchilla(rows)]
    middle = float(np.exp(np.log(rows.n_params).mean()))
    for law in laws:
        for r_star in (3.0, 15.0, 50.0):
            base = (law.E, law.A, law.B, law.alpha, law.beta, r_star)
            if form is Repeated:
                yield Repeated(*base)
                continue
            for epochs in (1.5, 3.0, 6.0, 12.0):
                yield Overfitted(*base, 0.01 * middle**-0.4, 0.4, epochs)


def _projected_starts(form: type[ScalingLaw], rows: Rows) -> list[ScalingLaw]:
    """Returns the best grid points that are not neighbours, and the published exponents."""
    units = form.units(rows.n_params, rows.tokens)
    scaled = Rows(rows.n_params / units[0], rows.tokens / units[1], rows.loss)
    pairs = [(a, b) for a in EXPONENT_GRID for b in EXPONENT_GRID if form is not Gadre or a == b]
    # Otherwise a single absurdly low loss would dominate the relative fit.
    target = np.maximum(rows.loss, np.median(rows.loss) / 3)
    ranked = sorted((_best_prefactors(form, a, b, scaled, target) for a, b in pairs), key=lambda candidate: candidate[0])
    chosen = list[tuple[float, tuple[float, float], ScalingLaw]]()
    for candidate in ranked:
        is_distinct = all(max(abs(np.subtract(candidate[1], other))) > 0.16 for _, other, _ in chosen)
        if np.isfinite(candidate[0]) and is_distinct:
            chosen.append(candidate)
        if len(chosen) == N_STARTS - 1:
            break
    chosen.append(_best_prefactors(form, *PUBLISHED_EXPONENTS[form], scaled, target))
    return [law.rescaled(*units) for _, _, law in chosen]


def _best_prefactors(
    form: type[ScalingLaw], first: float, second: float, rows: Rows, target: Floats
) -> tuple[float, tuple[float, float], ScalingLaw]:
    """Finds the non-negative prefactors for given exponents by least squares relative to the target losses.

    Returns (objective, exponents, law).
    """
    n, d = rows.n_params, rows.tokens
    if form is Kaplan:
        columns, target = np.stack([n**-second, 1 / d]), target ** (1 / first)
    else:
        columns = np.stack([np.ones_like(n), n**-first, d**-second])
    prefactors, _ = nnls((columns / target).T, np.ones_like(target))
    prefactors = [float(v) for v in np.maximum(prefactors, 1e-3 * target.min())]
    if form is Kaplan:
        law: ScalingLaw = Kaplan(prefactors[0] ** (1 / second), prefactors[1], float(first * second), float(first))
    elif form is Gadre:
        law = Gadre(prefactors[0], prefactors[1], float(prefactors[2] / SQRT_SIX**-first), -float(first))
    else:
        law = Chinchilla(prefactors[0], prefactors[1], prefactors[2], float(first), float(second))
    with np.errstate(all="ignore"):  # a start that overflows is the worst one
        objective = float(huber(log_residuals(law, rows)).sum())
    return objective, (first, second), law
