"""Start points of a fit: a law and a table in, laws near the best ones out.

For given exponents the prefactors are a linear least-squares problem (variable projection), so only exponents are searched.
Laws with more parameters start from the optimum of the law that they generalise.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations

import numpy as np

from lmu_dist.scaling.flexible_laws import EXAMPLE_FARSEER, Farseer, Gamma
from lmu_dist.scaling.laws import SQRT_SIX, Chinchilla, Floats, Gadre, Kaplan, ScalingLaw
from lmu_dist.scaling.minimise import ENTRIES, minimise
from lmu_dist.scaling.objective import Objective, huber
from lmu_dist.scaling.repeated import Overfitted, Repeated
from lmu_dist.scaling.table import Rows

EXPONENT_GRID = np.linspace(0.05, 1.2, 24)  # start points are chosen from this grid
PUBLISHED_EXPONENTS: dict[type[ScalingLaw], tuple[float, float]] = {
    Chinchilla: (0.34, 0.28),
    Gadre: (0.26, 0.26),
    Kaplan: (0.103, 0.738),
}  # a start
N_STARTS = 5
N_REMEMBERED = 16  # tables whose starts are remembered


def start_laws(form: type[ScalingLaw], rows: Rows) -> list[ScalingLaw]:
    """Returns the start points of a law on a table, in plain units."""
    if form in PUBLISHED_EXPONENTS:
        return _projected_starts(form, rows)
    if form is Repeated or form is Overfitted:
        return list(_repeated_starts(form, rows))
    chinchilla = _best_chinchilla(rows)
    return list(_gamma_starts(chinchilla) if form is Gamma else _farseer_starts(chinchilla, rows))


def _best_chinchilla(rows: Rows) -> Chinchilla:
    return _best_chinchilla_of(*_as_bytes(rows))


@lru_cache(maxsize=N_REMEMBERED)
def _best_chinchilla_of(n_params: bytes, tokens: bytes, loss: bytes) -> Chinchilla:
    """Returns the optimum of Chinchilla's law on a table of float64; remembered, as several laws start from it."""
    rows = Rows(np.frombuffer(n_params), np.frombuffer(tokens), np.frombuffer(loss))
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
    return list(_projected_starts_of(form, *_as_bytes(rows)))


@lru_cache(maxsize=N_REMEMBERED)
def _projected_starts_of(form: type[ScalingLaw], n_params: bytes, tokens: bytes, loss: bytes) -> tuple[ScalingLaw, ...]:
    """Returns the starts on a table of float64; remembered, as a fit of Chinchilla's law and its optimum both ask for them."""
    rows = Rows(np.frombuffer(n_params), np.frombuffer(tokens), np.frombuffer(loss))
    units = form.units(rows.n_params, rows.tokens)
    scaled = Rows(rows.n_params / units[0], rows.tokens / units[1], rows.loss)
    pairs = [(a, b) for a in EXPONENT_GRID for b in EXPONENT_GRID if form is not Gadre or a == b]
    # Otherwise a single absurdly low loss would dominate the relative fit.
    target = np.maximum(rows.loss, np.median(rows.loss) / 3)
    objectives, prefactors = _best_prefactors(form, np.array([*pairs, PUBLISHED_EXPONENTS[form]]), scaled, target)
    chosen = list[int]()
    for i in np.argsort(objectives[:-1], kind="stable").tolist():
        if np.isfinite(objectives[i]) and all(max(abs(np.subtract(pairs[i], pairs[other]))) > 0.16 for other in chosen):
            chosen.append(i)
        if len(chosen) == N_STARTS - 1:
            break
    laws = [_law_of(form, *pairs[i], prefactors[i]) for i in chosen]
    laws.append(_law_of(form, *PUBLISHED_EXPONENTS[form], prefactors[-1]))
    return tuple(law.rescaled(*units) for law in laws)


def _as_bytes(rows: Rows) -> tuple[bytes, bytes, bytes]:
    n, d, loss = (np.asarray(column, np.float64).tobytes() for column in (rows.n_params, rows.tokens, rows.loss))
    return n, d, loss


def _best_prefactors(form: type[ScalingLaw], exponents: Floats, rows: Rows, target: Floats) -> tuple[Floats, Floats]:
    """Finds the non-negative prefactors for given exponents (pairs, 2) by least squares relative to the target losses.

    Returns the objectives (pairs), infinite where a law overflows, and the prefactors (pairs, terms).
    """
    size, parts = max(1, ENTRIES // len(rows)), list[tuple[Floats, Floats]]()
    with np.errstate(all="ignore"):
        for first in range(0, len(exponents), size):
            one, two = exponents[first : first + size].T[..., None]
            n, d = rows.n_params, rows.tokens
            if form is Kaplan:
                targets = target ** (1 / one)
                columns = np.stack([n**-two, np.broadcast_to(1 / d, targets.shape)], axis=-1)
            else:
                targets = np.broadcast_to(target, (len(one), len(target)))
                columns = np.stack([np.ones_like(targets), n**-one, d**-two], axis=-1)
            prefactors = np.maximum(_non_negative(columns / targets[..., None]), 1e-3 * targets.min(axis=1)[:, None])
            predicted = np.matmul(columns, prefactors[..., None])[..., 0]
            residuals = (np.log(predicted) * one if form is Kaplan else np.log(predicted)) - np.log(rows.loss)
            objectives = huber(residuals).sum(axis=1)
            parts.append((np.where(np.isfinite(objectives), objectives, np.inf), prefactors))
    objectives, prefactors = (np.concatenate(values) for values in zip(*parts, strict=True))
    return objectives, prefactors


def _non_negative(columns: Floats) -> Floats:
    """Returns the non-negative coefficients (problems, terms) with which columns (problems, rows, terms) come closest to one.

    Of few terms every subset is tried: the best one whose coefficients are all positive is the solution. All problems are
    solved at once: scipy's nnls takes one at a time, six times as long for the grid of exponents.
    """
    n_terms = columns.shape[-1]
    norms = np.linalg.norm(columns, axis=1)
    scaled = columns / norms[:, None]
    gram, right = np.matmul(scaled.swapaxes(1, 2), scaled), scaled.sum(axis=1)
    best, lowered = np.zeros_like(right), np.zeros(len(right))
    for subset in (list(s) for k in range(1, n_terms + 1) for s in combinations(range(n_terms), k)):
        damped = gram[:, subset][:, :, subset] + 1e-14 * np.eye(len(subset))
        good = np.isfinite(damped).all(axis=(1, 2))
        damped[~good] = np.eye(len(subset))
        found = np.linalg.solve(damped, right[:, subset, None])[..., 0]
        gain = np.where(good & np.all(found > 0, axis=1), (found * right[:, subset]).sum(axis=1), -np.inf)
        better = gain > lowered
        best[better] = 0.0
        best[np.flatnonzero(better)[:, None], subset] = found[better]
        lowered[better] = gain[better]
    return best / norms


def _law_of(form: type[ScalingLaw], first: float, second: float, prefactors: Floats) -> ScalingLaw:
    """Returns the law with given exponents and prefactors, in the units of the table."""
    if form is Kaplan:
        return Kaplan(float(prefactors[0] ** (1 / second)), float(prefactors[1]), float(first * second), float(first))
    floor, of_n, of_d = (float(value) for value in prefactors)
    if form is Gadre:
        return Gadre(floor, of_n, float(of_d / SQRT_SIX**-first), -float(first))
    return Chinchilla(floor, of_n, of_d, float(first), float(second))
