"""Prints how a user's table was read, and the law fitted to it. Used by cli/; `laws` prints several laws side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmu_dist.show.tables import new_table, print_table

if TYPE_CHECKING:  # these imports are slow, and only needed for annotations
    from lmu_dist.scaling.read_table import RunTable
    from lmu_dist.scaling.table import Rows
    from lmu_dist.scaling.validate import FitResult

WORST_ROWS = 3  # whose loss a law misses most, as `fit` prints them


def print_table_notes(table: "RunTable") -> None:
    """Prints how unusual cells of a user's table were read, and which rows are left out."""
    for note in table.notes:
        print(f"table        {note}")
    for out in table.left_out:
        some = ", ".join(map(str, out.rows[:8])) + (", ..." if len(out.rows) > 8 else "")
        plural = "s" * (len(out.rows) != 1)
        print(f"left out     {len(out.rows):,} row{plural}: {out.reason} (row{plural} {some})")


def print_fit(result: "FitResult", rows: "Rows", numbers: "Sequence[int]") -> None:
    """Prints a law fitted to a table, its intervals and its diagnostics; `numbers` has the numbers of the rows in the file."""
    print(f"law          {result.form.__name__.lower()}, {result.n_rows:,} rows")
    unique = ", U unique tokens" if result.form.NEEDS_UNIQUE else ""
    print(f"formula      {result.form.FORMULA}; N parameters, D training tokens{unique}, L nats per token")
    for warning in result.warnings:
        print(f"warning      {warning}")
    if result.misfit:
        print(f"misses       {result.misfit.typical_miss:.2%} at the median; the largest:")
        for i, miss in list(zip(result.misfit.worst_rows, result.misfit.misses, strict=True))[:WORST_ROWS]:
            n, d, loss = rows.n_params[i], rows.tokens[i], rows.loss[i]
            print(f"             {miss:+.2%} row {numbers[i]}: N {n:,.12g}, D {d:,.12g}, loss {loss:.6g}")
    diagnostics = result.diagnostics
    if result.law is None:
        print("NOT DETERMINED")
        for reason in diagnostics.reasons:
            print(f"             {reason}")
        return
    table = new_table("parameter", "value", "90 % interval", "profile interval")
    for name, value in vars(result.law).items():
        ends = [result.intervals.get(name), result.profiles.get(name)]
        table.add_row(name, f"{value:.6g}", *(f"{i[0]:.4g} .. {i[1]:.4g}" if i else "" for i in ends))
    print_table(table)
    note = "; the fit minimised squared errors of L, as the authors of this law do" if result.form.LEAST_SQUARES else ""
    print(f"objective    {result.objective:.7g}, sum of Huber losses of ln L{note}")
    print(
        f"diagnostics  all checks passed: {diagnostics.n_agreeing} of {diagnostics.n_starts} starts found the same optimum, "
        f"relative gradient {diagnostics.gradient:.1g}, condition number {diagnostics.condition:.3g}; "
        f"{result.n_resamples:,} resamples"
    )
    if (holdout := result.holdout) and holdout.mean_error is not None:
        held_out = f"{holdout.n_rows} run{'s' * (holdout.n_rows > 1)} at N = {holdout.n_params:,.0f}"
        print(
            f"holdout      a fit without the {held_out} predicts their loss with a mean error of {holdout.mean_error:+.2%}, "
            f"the largest is {holdout.worst_error:+.2%}"
        )
    elif holdout:
        print(f"holdout      none: {'; '.join(holdout.reasons)}")
    moved = [f"{name} {i.without:.4g} (row {numbers[i.row]})" for name, i in result.influence.items()]
    if moved:
        print(f"influence    without the most influential row: {', '.join(moved)}")
