"""Predicts losses with intervals: a table of runs and points in, `Forecast` out.

    forecast = predict(rows, n_params=[7e9], tokens=[1.4e11])
    if forecast.reasons: ...            # no law is certified; loss, low and high are nan
    forecast.loss, forecast.low, forecast.high        # arrays, one entry per point, nats per token

The 90 % interval has three parts: the uncertainty of the parameters (bootstrap over independent runs), what one run differs
from another (the residuals of the table), and the form: laws that the table cannot tell apart all contribute, with Akaike's
weights. `predict` compares all laws by default; `predict_from` uses a comparison that was made before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lmu_dist.records import REPEATED
from lmu_dist.scaling.compare_laws import Candidate, LawComparison, compare_laws, repeats_data
from lmu_dist.scaling.intervals import CONFIDENCE, MIN_SHARE, resample
from lmu_dist.scaling.laws import Floats, ScalingLaw
from lmu_dist.scaling.objective import log_residuals
from lmu_dist.scaling.table import Rows

N_RESAMPLES, FEWEST_RESAMPLES = 1000, 200
NORMAL_MEDIAN = 1.4826  # standard deviation of normal errors over the median of their absolute values
SO_FAR = "the interval assumes that a law holds so far"
FAR = 10.0  # a point whose N or D is beyond the table's, at either end, by a larger factor is said to be far


@dataclass(frozen=True)
class Forecast:
    """Predicted losses in nats per token at points; `low` and `high` are the ends of their 90 % intervals.

    `law` is the chosen law's name, "" if none is certified; `laws` and `weights` are all that contribute. `reasons` says why
    there is no prediction; `warnings` what a reader should know, such as points far beyond the table.
    """

    n_params: Floats
    tokens: Floats
    loss: Floats
    low: Floats
    high: Floats
    law: str
    laws: tuple[str, ...]
    weights: tuple[float, ...]
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def predict(
    rows: Rows,
    n_params: ArrayLike,
    tokens: ArrayLike,
    laws: Sequence[type[ScalingLaw]] | None = None,
    labels: Sequence[str] | None = None,
    unique_tokens: ArrayLike | None = None,
    n_resamples: int = N_RESAMPLES,
    holdouts: bool = False,
) -> Forecast:
    """Predicts the loss at points (N, D) from a table of runs. `laws` are classes from `forms.FORMS`, by default all."""
    comparison = compare_laws(rows, laws, labels, holdouts=holdouts)
    return predict_from(comparison, n_params, tokens, unique_tokens, n_resamples)


def predict_from(
    comparison: LawComparison,
    n_params: ArrayLike,
    tokens: ArrayLike,
    unique_tokens: ArrayLike | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Forecast:
    """Predicts the loss at points (N, D) by the laws that a comparison supports.

    `unique_tokens` are those of each point's data. Only runs that repeat their data say what repeated tokens are worth; without
    any, a warning names the points where they are taken for new ones.
    """
    n, d = np.broadcast_arrays(np.atleast_1d(np.asarray(n_params, np.float64)), np.asarray(tokens, np.float64))
    if comparison.chosen is None:
        nothing = np.full(n.shape, np.nan)
        return Forecast(n, d, nothing, nothing, nothing, "", (), (), comparison.reasons)
    unique = None if unique_tokens is None else np.broadcast_to(np.asarray(unique_tokens, np.float64), n.shape)
    samples, weights, means = list[Floats](), list[Floats](), list[Floats]()
    for candidate in comparison.supported:
        count = min(n_resamples, max(FEWEST_RESAMPLES, round(n_resamples * candidate.weight)))  # little weight needs few
        drawn = draw_predictions(candidate, comparison, n, d, unique, count, seed)
        if drawn is None:
            continue
        if not comparison.fits:  # what the form misses at runs that were held out, it misses here at least
            form_error = NORMAL_MEDIAN * (
                candidate.held_out_error or (candidate.misfit.typical_miss if candidate.misfit else 0)
            )
            drawn = drawn + np.random.default_rng(seed + 2).normal(0, form_error, (len(drawn), 1))
        samples.append(drawn)
        weights.append(np.full(len(drawn), candidate.weight / len(drawn)))
        means.append(candidate.weight * np.median(drawn, axis=0))
    if not samples:
        nothing = np.full(n.shape, np.nan)
        reasons = ("too few resamples of the supported laws have a finite loss at these points",)
        return Forecast(n, d, nothing, nothing, nothing, "", (), (), reasons)
    total = sum(float(w.sum()) for w in weights)
    all_samples, all_weights = np.concatenate(samples), np.concatenate(weights) / total
    tail = (1 - CONFIDENCE) / 2
    low, middle, high = (_weighted_quantile(all_samples, all_weights, q) for q in (tail, 0.5, 1 - tail))
    return Forecast(
        n_params=n,
        tokens=d,
        loss=np.exp(middle),
        low=np.exp(low),
        high=np.exp(high),
        law=comparison.chosen.name,
        laws=tuple(c.name for c in comparison.supported),
        weights=tuple(c.weight for c in comparison.supported),
        warnings=(
            *misfit_warning(comparison),
            *_repeated_points(comparison.rows, d, unique),
            *far_points(comparison.rows, n, d),
        ),
    )


def misfit_warning(comparison: LawComparison) -> tuple[str, ...]:
    """Returns what a reader of a prediction must know if the form of the chosen law is wrong."""
    if comparison.fits or comparison.chosen is None:
        return ()
    if len(comparison.candidates) == 1:
        name = comparison.chosen.name
        return (f"{name} does not fit the table, and the intervals are wider by its misses; compare others by --law all",)
    return ("no law fits the table; the intervals are wider by the errors on runs that were held out",)


def draw_predictions(
    candidate: Candidate,
    comparison: LawComparison,
    n: Floats,
    d: Floats,
    unique: Floats | None,
    n_resamples: int,
    seed: int = 0,
    noise: bool = True,
) -> Floats | None:
    """Returns draws (resamples, points) of ln L by one law: its resamples, and the residual of a random run if `noise`.

    Returns None if too few resamples have a finite loss.
    """
    assert candidate.fit is not None
    rows, form = comparison.rows, candidate.form
    of_form = unique if form.NEEDS_UNIQUE else None
    with np.errstate(all="ignore"):
        best = np.log(candidate.fit.law.loss(n, d, of_form))
        laws = resample(candidate.fit, rows, comparison.labels, n_resamples, seed)
        drawn = np.log(np.array([law.loss(n, d, of_form) for law in laws]))
    drawn = drawn[np.all(np.isfinite(drawn), axis=1)]
    if len(drawn) < MIN_SHARE * n_resamples or not np.all(np.isfinite(best)):
        return None
    drawn = best + comparison.correction * (drawn - best)
    if not noise:
        return drawn
    residuals = log_residuals(candidate.fit.law, rows)
    inflation = np.sqrt(len(rows) / max(len(rows) - candidate.fit.n_free, 1))
    rng = np.random.default_rng(seed + 1)
    return drawn + inflation * rng.choice(residuals, drawn.shape)


def _weighted_quantile(samples: Floats, weights: Floats, quantile: float) -> Floats:
    """Returns the quantile of every column of samples (draws, points) with weights (draws)."""
    order = np.argsort(samples, axis=0)
    ordered = np.take_along_axis(samples, order, axis=0)
    cumulative = np.cumsum(weights[order], axis=0)
    index = np.minimum((cumulative < quantile).sum(axis=0), len(samples) - 1)
    return np.take_along_axis(ordered, index[None], axis=0)[0]


def _repeated_points(rows: Rows, d: Floats, unique: Floats | None) -> tuple[str, ...]:
    if unique is None or repeats_data(rows) or not np.any(repeated := d > REPEATED * unique):
        return ()
    most, count = float(np.max(d / unique)), int(repeated.sum())
    times = f"{most:,.0f} times" if most >= 100 else f"{most:.3g} times"
    who = f"{count} of {d.size} points read their data more than once, up to {times}"
    if d.size == 1:
        who = f"the training reads its data {times}"
    return (f"{who}; no run of the table does, so repeated tokens are counted as new, and the loss will be higher",)


def far_points(rows: Rows, n: Floats, d: Floats) -> tuple[str, ...]:
    """Returns warnings of points (N, D) beyond the table's range by a factor of more than FAR, at either end."""
    warnings = list[str]()
    for name, values, known in (("N", n, rows.n_params), ("D", d, rows.tokens)):
        above, below = float(np.max(values / known.max())), float(np.max(known.min() / values))
        if above > FAR:
            warnings.append(f"{name} is up to {above:,.0f} times the largest of the table: {SO_FAR}")
        if below > FAR:
            warnings.append(f"{name} is down to 1/{below:,.0f} of the smallest of the table: {SO_FAR}")
    return tuple(warnings)
