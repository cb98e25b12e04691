"""Prints laws side by side, forecasts and optima of a user's table, for people. `fit` prints that of a single law."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmu_dist.show.tables import new_table, print_table

if TYPE_CHECKING:
    from lmu_dist.scaling.compare_laws import Candidate, LawComparison
    from lmu_dist.scaling.forecast import Forecast
    from lmu_dist.scaling.intervals import Interval
    from lmu_dist.scaling.optimum import Optimum


def print_comparison(comparison: "LawComparison", intervals: Mapping[str, "Mapping[str, Interval]"]) -> None:
    """Prints every law with its misses, criterion and held-out error, and which ones the table supports.

    `intervals` has those of the parameters of every supported law that may be shown.
    """
    for warning in comparison.warnings:
        print(f"warning      {warning}")
    print(f"laws         {len(comparison.candidates)} on {len(comparison.rows):,} rows")
    shown = new_table("parameter", "parameters", "typical miss", "worst miss", "held-out error", "criterion", "status")
    for candidate in comparison.candidates:
        misfit, held_out = candidate.misfit, candidate.held_out_error
        shown.add_row(
            candidate.name,
            str(candidate.n_free),
            f"{misfit.typical_miss:.2%}" if misfit else "",
            f"{misfit.worst_miss:+.2%}" if misfit else "",
            f"{held_out:.2%}" if held_out is not None else "",
            f"{candidate.criterion:.1f}" if candidate.criterion is not None else "",
            _status(candidate, comparison),
        )
    print_table(shown)
    for candidate in comparison.candidates:
        for reason in candidate.reasons:
            print(f"{candidate.name:<12} {reason}")
    print("criterion    robust Akaike criterion above the lowest; laws within 6 of it cannot be told apart")
    if held := comparison.candidates[0].held_out if comparison.candidates else ():
        print(f"holdouts     fits without {'; '.join(f'{h.n_rows} runs of {h.what} > {h.above:.3g}' for h in held)}")
    _print_supported(comparison, intervals)


def _print_supported(comparison: "LawComparison", intervals: Mapping[str, "Mapping[str, Interval]"]) -> None:
    """Prints which laws the table supports, and the parameters of those that are determined; or why there is none."""
    if comparison.chosen is None:
        print("NOT DETERMINED")
        for reason in comparison.reasons:
            print(f"             {reason}")
        return
    names = [c.name for c in comparison.supported]
    if not comparison.fits:
        print(f"supported    {', '.join(names)}: no form fits the table; of them all it predicts held-out runs best")
    elif len(names) > 1:
        print(f"supported    a tie of {', '.join(names)}: the table cannot tell them apart; the simplest is {names[0]}")
    else:
        print(f"supported    {names[0]}")
    if comparison.fits and not comparison.determined:
        print("NOT DETERMINED")
    for candidate in comparison.supported:
        if candidate.imprecise:
            print(f"law          {candidate.name}: predicts; parameters not determined")
        else:
            _print_parameters(candidate, intervals.get(candidate.name, {}))


def _print_parameters(candidate: "Candidate", intervals: "Mapping[str, Interval]") -> None:
    """Prints the formula of a law, and its parameters with their intervals if it has any."""
    assert candidate.fit is not None
    values = vars(candidate.fit.law)
    if not intervals:
        shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        print(f"law          {candidate.name}: {candidate.form.FORMULA}; {shown}")
        return
    print(f"law          {candidate.name}: {candidate.form.FORMULA}")
    table = new_table("parameter", "value", "90 % interval")
    for name, value in values.items():
        ends = intervals.get(name)
        table.add_row(name, f"{value:.6g}", f"{ends[0]:.4g} .. {ends[1]:.4g}" if ends else "")
    print_table(table)


def _status(candidate: "Candidate", comparison: "LawComparison") -> str:
    if candidate in comparison.supported:
        if not comparison.fits:
            return "misfit, predicts best"
        support = "supported" if len(comparison.supported) == 1 else f"tied, weight {candidate.weight:.2f}"
        return f"{support}; predicts only" if candidate.imprecise else support
    if not candidate.diagnostics.passed:
        return "not determined"
    if candidate.misfit and candidate.misfit.reasons:
        return "misfit"
    return "worse"


def print_forecast(forecast: "Forecast", names: Sequence[str]) -> None:
    """Prints the predicted loss of every point; `names` has what each is called."""
    if forecast.reasons:
        print("NO FORECAST")
        for reason in forecast.reasons:
            print(f"             {reason}")
        return
    shown = new_table("parameter", "N", "D", "loss", "90 % interval")
    for i, name in enumerate(names):
        interval = f"{forecast.low[i]:.4f} .. {forecast.high[i]:.4f}"
        shown.add_row(name, f"{forecast.n_params[i]:.4g}", f"{forecast.tokens[i]:.4g}", f"{forecast.loss[i]:.4f}", interval)
    print_table(shown)
    print(f"forecast     nats per token; parameters, run-to-run noise and form ({', '.join(forecast.laws)})")
    for warning in forecast.warnings:
        print(f"warning      {warning}")


def print_optimum(optima: "Sequence[Optimum]") -> None:
    """Prints the compute-optimal N and D by every approach."""
    shown = new_table("parameter", "N", "90 % interval", "D", "exponent of N", "its interval", "bias taken off")
    for o in optima:
        if o.n_params is None or o.n_interval is None or o.exponent is None or o.exponent_interval is None:
            continue
        shown.add_row(
            o.approach,
            f"{o.n_params:.4g}",
            f"{o.n_interval[0]:.4g} .. {o.n_interval[1]:.4g}",
            f"{o.tokens:.4g}",
            f"{o.exponent:.4f}",
            f"{o.exponent_interval[0]:.4f} .. {o.exponent_interval[1]:.4f}",
            f"{o.bias - 1:+.1%}" if o.bias is not None else "",
        )
    print_table(shown)
    for o in optima:
        if o.reason:
            print(f"{o.approach:<12} none: {o.reason}")
        for warning in o.warnings:
            print(f"warning      {o.approach}: {warning}")
    print(f"optimum      of C = 6ND = {optima[0].flops:.4g} FLOPs")
