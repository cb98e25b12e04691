"""What `lmu-dist fit` computes and shows: a table and the options in, an `Outcome` that prints itself out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmu_dist import show
from lmu_dist.cli.fit_options import constraints_of, number_of, points_of
from lmu_dist.config import ConfigError
from lmu_dist.scaling.as_json import comparison_to_json, fit_to_json, forecast_to_json, to_json
from lmu_dist.scaling.compare_laws import LawComparison, compare_laws, forms_for, law_intervals
from lmu_dist.scaling.constraints import NONE
from lmu_dist.scaling.forecast import Forecast, predict_from
from lmu_dist.scaling.forms import FORMS
from lmu_dist.scaling.intervals import Interval
from lmu_dist.scaling.laws import Floats, ScalingLaw
from lmu_dist.scaling.optimum import Optimum, optimum_of
from lmu_dist.scaling.read_table import RunTable, read_points
from lmu_dist.scaling.table import LeftOutRows
from lmu_dist.scaling.validate import FitResult, fit_and_validate

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Request:
    """The options of the command, as they were given."""

    law: str | None
    fix: tuple[str, ...]
    tie: tuple[str, ...]
    predict: Path | None
    at: tuple[str, ...]
    optimum: str | None
    plot: Path | None
    resamples: int
    n_params: str
    tokens: str
    unique_tokens: str | None
    decimal: Literal[".", ","] | None


@dataclass(frozen=True)
class Outcome:
    """Everything that was computed: a fit, or a comparison of laws, and what was asked of them."""

    table: RunTable
    result: FitResult | None
    comparison: LawComparison | None
    forecast: Forecast | None
    point_names: Sequence[str]
    optima: Sequence[Optimum]
    plotted: Path | None
    points_left_out: Sequence[LeftOutRows] = ()
    intervals: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)  # of the supported laws, by law and parameter

    @property
    def determined(self) -> bool:
        """Whether there is a law whose parameters may be shown: the one that was asked for, or the chosen one of all."""
        if self.result is not None:
            return self.result.law is not None
        return self.comparison is not None and self.comparison.determined

    def show(self) -> None:
        """Prints everything for people."""
        if self.result is not None:
            show.print_fit(self.result, self.table.rows, self.table.numbers)
        elif self.comparison is not None:
            show.print_comparison(self.comparison, self.intervals)
        if self.forecast is not None:
            show.print_forecast(self.forecast, self.point_names)
            for out in self.points_left_out:
                print(f"left out     {len(out.rows)} of --predict: {out.reason}")
        if self.optima:
            show.print_optimum(self.optima)
        if self.plotted is not None:
            print(f"figure       {self.plotted}")

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON types."""
        names = [str(number) for number in self.table.numbers]
        facts = fit_to_json(self.result, names) if self.result is not None else {}
        if self.result is None and self.comparison is not None:
            facts |= comparison_to_json(self.comparison)
            for law in facts["laws"]:
                law["intervals"] = to_json(self.intervals.get(law["law"], {}))
        if self.forecast is not None:
            left_out = [{"reason": out.reason, "rows": list(out.rows)} for out in self.points_left_out]
            facts["forecast"] = forecast_to_json(self.forecast, self.point_names) | {"left_out": left_out}
        if self.optima:
            facts["optimum"] = to_json([asdict(optimum) for optimum in self.optima])
        return facts


@dataclass(frozen=True)
class Questions:
    """What is asked of a law: points (N, D, unique tokens) by name, and a budget of FLOPs."""

    names: Sequence[str]
    points: tuple[Floats, Floats, Floats | None]
    flops: float | None
    left_out: Sequence[LeftOutRows] = ()  # of the table of points


def fit_one(table: RunTable, request: Request) -> Outcome:
    """Fits a single law, and makes forecasts and optima by it."""
    questions = _questions(request)
    form, names = FORMS[request.law or "chinchilla"], [str(number) for number in table.numbers]
    constraints = constraints_of(request.fix, request.tie)
    constraints.check(form)
    if form.NEEDS_UNIQUE and table.rows.unique_tokens is None:
        raise ConfigError(f"--law {request.law} needs the unique tokens of every run; name their column by --unique")
    result = fit_and_validate(form, table.rows, n_resamples=request.resamples, names=names, constraints=constraints)
    if not (request.predict or request.at or request.optimum or request.plot):
        return Outcome(table, result, None, None, (), (), None)
    comparison = compare_laws(
        table.rows, [form], names=names, holdouts=False, constraints=constraints, n_resamples=request.resamples
    )
    return _with_forecasts(table, request, questions, result, comparison)


def fit_several(table: RunTable, request: Request) -> Outcome:
    """Compares all laws, or those of repeated data if unique tokens are given and no law is asked for."""
    questions = _questions(request)
    if constraints_of(request.fix, request.tie) != NONE:
        raise ConfigError("--fix and --tie are for a single law; choose it by --law")
    forms: Sequence[type[ScalingLaw]] = forms_for(table.rows)
    names = [str(number) for number in table.numbers]
    comparison = compare_laws(table.rows, forms, names=names, n_resamples=request.resamples)
    result = None
    if request.law is None and request.unique_tokens is not None:  # the better law, as a fit of its own
        chosen = comparison.chosen
        form = chosen.form if chosen else FORMS["repeated" if FORMS["repeated"] in forms else "chinchilla"]
        result = fit_and_validate(form, table.rows, n_resamples=request.resamples, names=names)
    outcome = _with_forecasts(table, request, questions, result, comparison)
    return outcome if result is not None else replace(outcome, intervals=law_intervals(comparison, request.resamples))


def _with_forecasts(
    table: RunTable, request: Request, questions: Questions, result: FitResult | None, comparison: LawComparison
) -> Outcome:
    forecast = predict_from(comparison, *questions.points, request.resamples) if questions.names else None
    optima = optimum_of(comparison, questions.flops, request.resamples) if questions.flops else []
    if request.plot is not None:
        from lmu_dist.scaling.plot import plot_fit  # imports matplotlib, which takes a second

        try:
            plot_fit(comparison, request.plot, forecast)
        except (OSError, ValueError) as e:
            raise ConfigError(f"--plot {request.plot}: {e}") from e
    return Outcome(table, result, comparison, forecast, questions.names, optima, request.plot, questions.left_out)


def _questions(request: Request) -> Questions:
    """Returns what is asked for. Raises ConfigError before anything is fitted."""
    if request.plot is not None and not request.plot.absolute().parent.is_dir():
        raise ConfigError(f"--plot {request.plot}: there is no folder {request.plot.parent}; make it, or choose another FILE")
    if request.plot is not None and request.plot.suffix.lower() not in FIGURE_SUFFIXES:
        raise ConfigError(f"--plot {request.plot}: the name must end in one of {', '.join(FIGURE_SUFFIXES)}")
    n, d, unique = points_of(request.at, request.unique_tokens is not None)
    names = [f"--at {text}" for text in request.at]
    flops = number_of(request.optimum, "--optimum") if request.optimum else None
    if request.predict is None:
        return Questions(names, (n, d, unique), flops)
    read = read_points(
        request.predict, request.n_params, request.tokens, unique_tokens=request.unique_tokens, decimal=request.decimal
    )
    names = [*(f"row {number}" for number in read.numbers), *names]
    together = None
    if unique is not None and read.unique_tokens is not None:
        together = np.concatenate([read.unique_tokens, unique])
    return Questions(
        names, (np.concatenate([read.n_params, n]), np.concatenate([read.tokens, d]), together), flops, read.left_out
    )
