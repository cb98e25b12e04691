"""One table, one law, and all that speaks for and against it: fit, certificate, intervals, holdout, influence.

`lmu-dist fit` and the report show what stands here; without a certificate there is no law to show.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from lmu_dist.scaling.certificate import Certificate, certify, too_wide, unfit
from lmu_dist.scaling.fit import Fit, fit, n_parameters, refit
from lmu_dist.scaling.intervals import N_RESAMPLES, Interval, of_parameters, profile, resampled, weights, widening
from lmu_dist.scaling.laws import Law, parameters
from lmu_dist.scaling.table import Rows, rungs

MOST_LEFT_OUT_SINGLY = 400  # refits that the search for influential runs may cost
MOST_DRAWN = 2_000_000  # runs times resamples; of a long table fewer resamples say as much


@dataclass(frozen=True)
class Holdout:
    """The largest size, predicted by a fit that has not seen it: relative errors, positive where the prediction is too high."""

    n_params: float
    n_rows: int
    mean_error: float | None
    worst_error: float | None
    reasons: tuple[str, ...]  # why there is no prediction


@dataclass(frozen=True)
class Influence:
    """The single run that moves a parameter most, if left out: its index, and the parameter without it."""

    row: int
    without: float


@dataclass(frozen=True)
class Examination:
    """`law` is None unless the certificate is good; the other numbers then describe a fit that is not to be used."""

    form: type[Law]
    n_rows: int
    law: Law | None
    objective: float | None
    certificate: Certificate
    intervals: dict[str, Interval] = field(default_factory=dict)
    profiles: dict[str, Interval | None] = field(default_factory=dict)
    holdout: Holdout | None = None
    influence: dict[str, Influence] = field(default_factory=dict)
    n_resamples: int = 0
    laws: tuple[Law, ...] = ()  # of the resamples
    widen: float = 1.0  # by which the spread of the resamples is too small


def examine(
    form: type[Law], rows: Rows, labels: Sequence[str] | None = None, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Examination:
    """Fits a law and looks at it from all sides. Runs with one label are resampled together; without labels each by itself."""
    if reasons := unfit(form, rows):
        return Examination(form, len(rows), None, None, Certificate(tuple(reasons)))
    found = fit(form, rows)
    certificate = certify(found, rows)
    if not certificate.ok:
        return Examination(form, len(rows), None, found.objective, certificate)
    enough = len(rows) >= 2 * n_parameters(form)  # fewer are met whatever they weigh, and the intervals would be too narrow
    n_resamples = min(n_resamples, max(200, MOST_DRAWN // len(rows)))
    labels = labels or [str(i) for i in range(len(rows))]
    laws = resampled(found, rows, weights(labels, n_resamples, seed)) if enough else []
    widen = widening(found, rows, len(set(labels)))
    intervals = of_parameters(found.law, laws, widen) if laws else {}
    missing = [f"too few resamples have a {name}" for name in parameters(found.law) if laws and name not in intervals]
    certificate = replace(certificate, reasons=tuple(missing + too_wide(intervals, form)))
    unitless = [*form.EXPONENTS, *(["E"] if form.HAS_FLOOR else [])]
    return Examination(
        form=form,
        n_rows=len(rows),
        law=found.law if certificate.ok else None,
        objective=found.objective,
        certificate=certificate,
        intervals=intervals,
        profiles={name: profile(found, rows, name) for name in unitless} if certificate.ok else {},
        holdout=holdout(form, rows),
        influence=influence(found, rows) if certificate.ok else {},
        n_resamples=len(laws),
        laws=tuple(laws),
        widen=widen,
    )


def holdout(form: type[Law], rows: Rows) -> Holdout:
    """Fits without the largest rung of N and predicts it."""
    sizes = rungs(rows.n_params)
    largest = float(sizes.max())
    kept, held = rows.where(sizes < largest), rows.where(sizes == largest)
    if reasons := unfit(form, kept):
        return Holdout(largest, len(held), None, None, tuple(reasons))
    found = fit(form, kept)
    certificate = certify(found, kept)
    if not certificate.ok:
        return Holdout(largest, len(held), None, None, certificate.reasons)
    errors = found.law.loss(held.n_params, held.tokens) / held.loss - 1
    return Holdout(largest, len(held), float(errors.mean()), float(errors[np.abs(errors).argmax()]), ())


def influence(found: Fit, rows: Rows) -> dict[str, Influence]:
    """For E and every exponent the run whose absence moves it most. In long tables only runs far off the law are tried."""
    form = type(found.law)
    tried = np.argsort(-np.abs(np.log(found.law.loss(rows.n_params, rows.tokens) / rows.loss)))[:MOST_LEFT_OUT_SINGLY]
    most = dict[str, Influence]()
    for row in tried:
        without = parameters(refit(found.law, rows.where(np.arange(len(rows)) != row), tolerance=1e-4).law)
        for name in [*form.EXPONENTS, *(["E"] if form.HAS_FLOOR else [])]:
            here = getattr(found.law, name)
            if name not in most or abs(without[name] - here) > abs(most[name].without - here):
                most[name] = Influence(int(row), without[name])
    return most


def told(seen: Examination, names: Sequence[str]) -> dict[str, Any]:
    """An examination as JSON has it; `names` say which row is which. Without a certificate no parameter and no interval."""
    held, exact = seen.holdout, seen.certificate
    return {
        "law": seen.form.__name__.lower(),
        "n_rows": seen.n_rows,
        "determined": seen.certificate.ok,
        "objective": seen.objective,
        "parameters": parameters(seen.law) if seen.law else {},
        "intervals": {k: list(v) for k, v in seen.intervals.items()} if seen.law else {},
        "profile_intervals": {k: list(v) if v else None for k, v in seen.profiles.items()},
        "n_resamples": seen.n_resamples,
        "certificate": {
            "ok": exact.ok,
            "reasons": list(exact.reasons),
            "n_starts": exact.n_starts,
            "n_agreeing": exact.n_agreeing,
            "gradient": exact.gradient,
            "condition": exact.condition if exact.condition is not None and np.isfinite(exact.condition) else None,
        },
        "holdout": None if held is None else asdict(held) | {"reasons": list(held.reasons)},
        "influence": {k: {"row": names[v.row], "without": v.without} for k, v in seen.influence.items()},
    }
