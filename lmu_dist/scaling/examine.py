"""One table, one law, and all that speaks for and against it: fit, certificate, intervals, holdout, influence.

`lmu-dist fit` and the report show what stands here; without a certificate there is no law to show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lmu_dist.scaling.certificate import Certificate, certify, too_wide, unfit
from lmu_dist.scaling.fit import Fit, fit, n_parameters, refit, unitless_names
from lmu_dist.scaling.intervals import N_RESAMPLES, Interval, of_parameters, profile, resampled, weights, widening
from lmu_dist.scaling.laws import Law, parameters
from lmu_dist.scaling.table import Rows, rungs

MOST_LEFT_OUT_SINGLY = 400  # refits that the search for influential runs may cost
FIRST_LOOK = 100  # resamples after which what is not determined is given up
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
    n_labels: int = 0  # what was resampled: runs, or fewer groups of them


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
    labels = labels or rows.copies()
    n_labels = len(set(labels))
    widen = widening(found, rows, n_labels)
    laws = list[Law]()
    if n_labels >= 2 * n_parameters(form):  # fewer are met whatever they weigh, and the intervals would be too narrow
        drawn = weights(labels, min(n_resamples, max(200, MOST_DRAWN // len(rows))), seed)
        laws = resampled(found, rows, drawn[:FIRST_LOOK])
        if not too_wide(of_parameters(found.law, laws, widen), form):
            laws += resampled(found, rows, drawn[FIRST_LOOK:])
    profiles = {name: profile(found, rows, name) for name in unitless_names(form)}
    intervals = of_parameters(found.law, laws, widen) if laws else {}
    missing = [f"too few resamples have a {name}" for name in parameters(found.law) if laws and name not in intervals]
    known = intervals if laws else {name: profiles[name] or (0.0, np.inf) for name in form.EXPONENTS}
    certificate = replace(certificate, reasons=tuple(missing + too_wide(known, form)))
    return Examination(
        form=form,
        n_rows=len(rows),
        law=found.law if certificate.ok else None,
        objective=found.objective,
        certificate=certificate,
        intervals=intervals,
        profiles=profiles if certificate.ok else {},
        holdout=holdout(form, rows),
        influence=influence(found, rows) if certificate.ok else {},
        n_resamples=len(laws),
        laws=tuple(laws),
        widen=widen,
        n_labels=n_labels,
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
        for name in unitless_names(form):
            here = getattr(found.law, name)
            if name not in most or abs(without[name] - here) > abs(most[name].without - here):
                most[name] = Influence(int(row), without[name])
    return most
