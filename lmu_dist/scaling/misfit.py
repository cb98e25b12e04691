"""Tests whether a law has the form of the table: a fit and its rows in, `Misfit` out.

An optimum may be exact and its law wrong all the same. If residuals are a smooth function of ln N and ln D beyond what noise
explains, the law bends where the runs do not; its intervals then describe a curve that the runs do not follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmu_dist.scaling.fit import Fit
from lmu_dist.scaling.laws import Floats
from lmu_dist.scaling.objective import Objective, losses
from lmu_dist.scaling.quantiles import chi_squared_median, f_survival
from lmu_dist.scaling.shared_noise import MIN_GROUPS, orthonormal, whitening
from lmu_dist.scaling.table import Rows, rows_are_copies

SIGNIFICANCE = 0.01  # of the test of structure: the share of correct laws that are called a misfit
MATERIAL = 1e-4  # smallest root mean square of the structure in ln L that counts
CLIP = 3.0  # residuals are clipped at so many robust standard deviations, so that outliers are no structure
MAX_TERMS = 7  # smooth functions of N and D that are tested
N_FLIPS = 2000
MIN_REMAINDER = 0.05  # smallest share of a group's variance that the fit leaves, for its correction
WORST_ROWS = 5
SAME_POINT_SPREAD = 1e-4  # runs of the same N and D whose ln L differs by less are copies, not repeated runs
OUTLIER_DEVIATIONS, OUTLIER_MISS = 8.0, 0.02  # both must be exceeded


@dataclass(frozen=True)
class Misfit:
    """How well a law describes its rows; misses are relative errors of the predicted loss, positive if it is too high.

    `structure` is the root mean square of the smooth part of the misses, `p_value` the probability that noise alone has as
    much; None if there are too few independent runs for a test. `replicate_noise` is the relative standard deviation of
    runs with the same N and D, if there are several. `reasons` says why the form is wrong; empty if it may be right.
    """

    typical_miss: float
    worst_miss: float
    worst_rows: tuple[int, ...]
    misses: tuple[float, ...]
    outliers: tuple[int, ...]
    structure: float | None
    p_value: float | None
    replicate_noise: float | None
    reasons: tuple[str, ...]


def find_misfit(fit: Fit, rows: Rows, labels: Sequence[str] | None = None) -> Misfit:
    """Returns how well a fit describes its rows. Rows with the same label are not independent."""
    with np.errstate(all="ignore"):  # a law at its bounds may have infinite losses
        relative = np.nan_to_num(losses(fit.law, rows) / rows.loss - 1, nan=1e300, posinf=1e300, neginf=-1.0)
    misses = np.abs(relative)
    worst = np.argsort(-misses)[:WORST_ROWS]
    spread = _robust_deviation(np.log1p(relative))
    outliers = np.flatnonzero(misses > max(OUTLIER_DEVIATIONS * spread, OUTLIER_MISS))
    structure, p_value = structure_test(fit, rows, labels or rows.duplicate_groups())
    noise, reasons = replicate_noise(rows), list[str]()
    typical = float(np.median(misses))
    if p_value is not None and structure is not None and p_value < SIGNIFICANCE and structure > MATERIAL:
        chance = f"p = {p_value:.1g}" if p_value >= 1e-6 else "p < 1e-6"
        most = _percent(float(misses[worst[0]]))
        reasons.append(
            f"misfit: the law misses the losses by {_percent(typical)} at the median and {most} at most, "
            f"and of that {_percent(structure)} (root mean square) varies with N and D as noise does not ({chance})"
        )
    return Misfit(
        typical_miss=typical,
        worst_miss=float(relative[worst[0]]),
        worst_rows=tuple(worst.tolist()),
        misses=tuple(relative[worst].tolist()),
        outliers=tuple(outliers.tolist()),
        structure=structure,
        p_value=p_value,
        replicate_noise=noise,
        reasons=tuple(reasons),
    )


def outlier_warnings(misfit: Misfit, names: Sequence[str]) -> list[str]:
    """Returns a sentence about the rows that are far from the law, if there are any. `names` has what to call each row."""
    if not misfit.outliers:
        return []
    shown = ", ".join(names[i] for i in misfit.outliers[:WORST_ROWS]) + (", ..." if len(misfit.outliers) > WORST_ROWS else "")
    which = f"row {shown} is" if len(misfit.outliers) == 1 else f"rows {shown} are"
    return [f"{which} far from the law, by up to {_percent(abs(misfit.worst_miss))}: check these runs; they have little weight"]


def structure_test(fit: Fit, rows: Rows, labels: Sequence[str]) -> tuple[float | None, float | None]:
    """Returns the root mean square of the residuals' smooth part in ln L, and the probability that it is noise.

    Residuals are projected onto polynomials of ln N and ln D, orthogonally to what the law's own parameters can change. If
    all runs are independent, the ratio of mean squares is compared with the F distribution; otherwise with those of residuals
    whose signs are changed at random, group by group. Of few groups there are few signs: there everything is multiplied by the
    matrix that makes the noise of runs independent.
    """
    first = {label: i for i, label in enumerate(labels)}
    groups = np.unique(np.array(list(labels)), return_inverse=True)[1]
    if rows_are_copies(rows, labels):
        keep = np.zeros(len(rows), bool)
        keep[list(first.values())] = True
        rows, groups = rows.where(keep), np.arange(keep.sum())
    objective = Objective(type(fit.law), rows)
    with np.errstate(all="ignore"):
        residuals, jacobian = objective.residuals_and_jacobian(objective.vector(fit.law))
    jacobian = jacobian @ fit.constraints.basis(type(fit.law), with_kink=True).T
    n_groups, whiten, colour = int(groups.max()) + 1, None, None
    if not (np.all(np.isfinite(jacobian)) and np.all(np.isfinite(residuals))):
        return None, None
    if n_groups < MIN_GROUPS and n_groups < len(rows):
        n_groups, (whiten, colour) = len(rows), whitening(fit, rows, labels)
        jacobian = whiten @ jacobian
    law_space = orthonormal(jacobian)
    n_free = n_groups - law_space.shape[1]
    n_terms = min(MAX_TERMS, n_free // 3)
    if n_terms < 1:
        return None, None
    smooth = _smooth_terms(rows, law_space, n_terms, whiten)
    if not smooth.shape[1]:
        return None, None
    deviation = _robust_deviation(residuals)
    clipped = np.clip(residuals, -CLIP * deviation, CLIP * deviation)
    clipped = clipped if whiten is None else whiten @ clipped
    clipped -= law_space @ (law_space.T @ clipped)
    scores = smooth.T @ clipped
    remainder = clipped - smooth @ scores
    smooth_part = smooth @ scores if colour is None else colour @ smooth @ scores
    structure = float(np.sqrt(np.mean(smooth_part**2)))
    if n_groups == len(rows):
        n_left = len(rows) - law_space.shape[1] - smooth.shape[1]
        ratio = np.mean(scores**2) / max(float(np.sum(remainder**2)) / n_left, 1e-300)
        return structure, f_survival(ratio, smooth.shape[1], n_left)
    by_group = np.zeros((n_groups, smooth.shape[1]))
    for group in range(n_groups):
        which = groups == group
        by_group[group] = smooth[which].T @ _unshrunk(clipped[which], law_space[which])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (N_FLIPS, n_groups))
    flipped = np.sum((signs @ by_group) ** 2, axis=1)
    return structure, float((1 + np.sum(flipped >= np.sum(scores**2))) / (1 + N_FLIPS))


def _unshrunk(remainder: Floats, fitted_space: Floats) -> Floats:
    """Returns the residuals of one group without the shrinkage by the fit: (I - H)^(-1/2) r with H the group's own leverage.

    Bell and McCaffrey 2002 correct variances of clustered data so (CR2).
    """
    values, vectors = np.linalg.eigh(np.eye(len(remainder)) - fitted_space @ fitted_space.T)
    return vectors @ ((vectors.T @ remainder) / np.sqrt(np.maximum(values, MIN_REMAINDER)))


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def _smooth_terms(rows: Rows, law_space: Floats, n_terms: int, whiten: Floats | None = None) -> Floats:
    """Returns orthonormal smooth functions of ln N and ln D (rows, terms) that the law cannot imitate, simple ones first."""
    x, y = (np.log(v / np.exp(np.log(v).mean())) for v in (rows.n_params, rows.tokens))
    x, y = x / max(float(x.std()), 1e-300), y / max(float(y.std()), 1e-300)
    terms = np.empty((len(rows), 0))
    columns = (np.ones_like(x), x, y, x * y, x**2, y**2, x**3, x**2 * y, x * y**2, y**3)
    for column in columns:
        column = column if whiten is None else whiten @ column
        column = column / np.linalg.norm(column)
        left = column - law_space @ (law_space.T @ column)
        left -= terms @ (terms.T @ left)
        size = np.linalg.norm(left)
        if size > 0.03:  # otherwise the law can imitate it, but for higher orders
            terms = np.column_stack([terms, left / size])
        if terms.shape[1] == n_terms:
            break
    return terms


def _robust_deviation(values: Floats) -> float:
    """Returns the standard deviation of normal values that have the same median distance from zero."""
    return 1.4826 * float(np.median(np.abs(values))) + 1e-300


def repeated_points(rows: Rows) -> list[list[int]]:
    """Returns the rows, by index, of every point (N, D, unique tokens) that several rows have."""
    points = dict[tuple[float, ...], list[int]]()
    columns = [rows.n_params, rows.tokens, *([] if rows.unique_tokens is None else [rows.unique_tokens])]
    for i, point in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        points.setdefault(point, []).append(i)
    return [group for group in points.values() if len(group) > 1]


def replicate_noise(rows: Rows) -> float | None:
    """Returns the standard deviation of ln L between repeated runs of the same N and D, robustly; None for fewer than three."""
    logs = [np.log(rows.loss[group]) for group in repeated_points(rows)]
    logs = [group for group in logs if np.ptp(group) > SAME_POINT_SPREAD]
    if len(logs) < 3:
        return None
    # The median of sample variances, in units of the median that normal values have at so many degrees of freedom.
    scaled = [np.var(group, ddof=1) * (len(group) - 1) / chi_squared_median(len(group) - 1) for group in logs]
    return float(np.sqrt(np.median(scaled)))
