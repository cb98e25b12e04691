"""The command that fits scaling laws to a user's table: fit.

Heavy modules are imported inside the functions, so that --help is fast.
"""

from pathlib import Path
from typing import Literal

import click

from lmu_dist import show
from lmu_dist.cli.common import cli, json_option
from lmu_dist.cli.progress import slow_progress


@cli.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--n", "n_params", required=True, metavar="COL", help="Column with the number of parameters.")
@click.option("--d", "tokens", required=True, metavar="COL", help="Column with the training tokens.")
@click.option("--loss", required=True, metavar="COL", help="Column with the final loss in nats per token.")
@click.option("--law", type=click.Choice(["chinchilla", "kaplan", "gadre"]), default="chinchilla", show_default=True)
@click.option("--unique", "unique_tokens", metavar="COL", help="Column with the unique tokens of each run's data.")
@click.option("--run", metavar="COL", help="Column that names the run: only the last row of each run is used.")
@click.option(
    "--decimal", type=click.Choice([".", ","]), help="Decimal mark of the numbers, where a table does not show which it is."
)
@click.option(
    "--where", multiple=True, metavar="COND", help="Use only rows with 'col=value', or != < <= > >=. May be repeated."
)
@click.option(
    "--resamples",
    default=1000,
    show_default=True,
    type=click.IntRange(100),
    help="Number of bootstrap refits for the intervals.",
)
@json_option
def fit(
    table: Path,
    n_params: str,
    tokens: str,
    loss: str,
    law: str,
    unique_tokens: str | None,
    run: str | None,
    decimal: Literal[".", ","] | None,
    where: tuple[str, ...],
    resamples: int,
    as_json: bool,
) -> int:
    """Fit a scaling law to a TABLE with one row per finished run.

    TABLE is a file in CSV or other delimited text, JSON, JSON lines, Parquet or Feather, which may be compressed, or - for
    standard input. Columns are given by name, or by number from 1. Numbers may be written as 18.9M, 1,234,567 or 4,61; rows
    without a number are left out and listed. Exit code 3: the table does not determine the law.
    """
    from lmu_dist.scaling.read_table import read_table

    read = read_table(table, n_params, tokens, loss, where, unique_tokens=unique_tokens, run=run, decimal=decimal)

    from lmu_dist.scaling.as_json import fit_to_json, table_to_json  # after the table was read: an error comes at once
    from lmu_dist.scaling.forms import FORMS
    from lmu_dist.scaling.validate import fit_and_validate

    names = [str(number) for number in read.numbers]
    with slow_progress(f"fitting {law}"):
        result = fit_and_validate(FORMS[law], read.rows, n_resamples=resamples, names=names)
    if as_json:
        show.print_json(table_to_json(read, table, where) | fit_to_json(result, names))
    else:
        show.print_table_notes(read)
        show.print_fit(result, read.rows, read.numbers)
    return 0 if result.law else 3
