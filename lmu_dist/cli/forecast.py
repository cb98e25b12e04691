"""The command that predicts the loss of a cell before it has ended: forecast.

Heavy modules are imported inside the functions, so that --help is fast.
"""

from dataclasses import asdict
from typing import Any

import click

from lmu_dist import show
from lmu_dist.cli.common import cli, json_option, print_notes, tracking_uri
from lmu_dist.cli.progress import slow_progress


class WholeNumber(click.ParamType):
    """A positive whole number, also as 800_000, 800,000, 8e5, 800k or 18.9M."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the number. Raises click's error of one line if it is none."""
        from lmu_dist.scaling.numbers import parse_cell

        number = parse_cell(value).by_mark.get(".")
        if number is None or number < 1 or number != round(number):
            self.fail(f"{value!r} is not a positive whole number, such as 800000, 8e5 or 18.9M", param, ctx)
        return round(number)


@cli.command()
@click.argument("experiment")
@click.option("--family", required=True, metavar="F", help="Family of the cell, as in ladder.families.")
@click.option("--n", "n_params", required=True, type=WholeNumber(), metavar="N", help="Size, as in ladder.n_params.")
@click.option("--tokens", required=True, type=WholeNumber(), metavar="D", help="Training tokens, as in ladder.tokens.")
@json_option
def forecast(experiment: str, family: str, n_params: int, tokens: int, as_json: bool) -> int:
    """Predict the validation loss of a cell that has not ended, and write the forecast to MLflow.

    The prediction is made from the finished runs of EXPERIMENT. `lmu-dist report` compares it with the loss once the cell has
    ended; of several forecasts of a cell the first one counts. Exit code 3: the runs do not determine a law, and nothing is
    written.
    """
    from lmu_dist.launch.cell import git_commit
    from lmu_dist.report.forecasts import make_forecast
    from lmu_dist.tracking.store import existing_store
    from lmu_dist.tracking.upload import set_client_limits

    set_client_limits()
    with slow_progress("comparing laws"):
        made = make_forecast(existing_store(tracking_uri()), experiment, family, n_params, tokens, git_commit())
    if made.stored is None:
        if as_json:
            show.print_json({"determined": False, "reasons": made.reasons, **asdict(made.cell)})
        else:
            show.console.print(f"lmu-dist: no forecast: {'; '.join(made.reasons)}")
        return 3
    stored = made.stored
    if as_json:
        show.print_json({"determined": True, **asdict(stored), "n_earlier": made.n_earlier})
        return 0
    laws = ", ".join(f"{name} {weight:.0%}" for name, weight in stored.laws.items())
    print(
        f"forecast     {stored.family}, N = {stored.n_params:,} (for {stored.requested_n_params:,}), "
        f"{stored.trained_tokens:,} tokens: {stored.loss_nats:.4f} nats per token"
    )
    print(f"interval     {stored.low_nats:.4f} to {stored.high_nats:.4f} ({stored.level:.0%})")
    print(f"laws         {laws}; fitted to {stored.n_runs:,} runs of {stored.family}")
    print(f"written      {stored.made}, MLflow run {stored.run_id}")
    print(f"next         lmu-dist report {experiment}  # compares it with the loss once the cell has ended")
    print_notes(stored.warnings)
    if made.n_earlier:
        plural = "s" * (made.n_earlier > 1)
        print_notes([f"{made.n_earlier} earlier forecast{plural} of this cell: the first one counts, this one is kept too"])
    return 0
