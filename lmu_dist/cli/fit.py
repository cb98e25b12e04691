"""The command that fits scaling laws to a user's table: fit.

Heavy modules are imported inside the functions, so that --help is fast.
"""

from pathlib import Path
from typing import Literal

import click

from lmu_dist import show
from lmu_dist.cli.common import cli, json_option
from lmu_dist.cli.progress import slow_progress

LAW_NAMES = ["chinchilla", "kaplan", "gadre", "gamma", "farseer", "repeated", "overfitted", "all"]


@cli.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--n", "n_params", required=True, metavar="COL", help="Column with the number of parameters.")
@click.option("--d", "tokens", required=True, metavar="COL", help="Column with the training tokens.")
@click.option("--loss", required=True, metavar="COL", help="Column with the final loss in nats per token.")
@click.option(
    "--law",
    type=click.Choice(LAW_NAMES),
    help="Law to fit; `all` compares all of them. Default: chinchilla; with --unique, the better law of repeated data; with "
    "--predict, --at or --optimum, all.",
)
@click.option("--fix", multiple=True, metavar="NAME=VALUE", help="Hold E or an exponent at a value. May be repeated.")
@click.option("--tie", multiple=True, metavar="A=B", help="Give two exponents the same value, as in alpha=beta.")
@click.option("--predict", type=click.Path(path_type=Path), metavar="POINTS", help="Predict the loss of every row of a table.")
@click.option("--at", multiple=True, metavar="N,D", help="Predict the loss at a point, such as 7B,140B. May be repeated.")
@click.option("--optimum", metavar="C", help="Compute-optimal N and D for a budget of C = 6ND FLOPs, such as 1e21.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw runs, law and misses into a PNG, SVG or PDF."
)
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
    law: str | None,
    fix: tuple[str, ...],
    tie: tuple[str, ...],
    predict: Path | None,
    at: tuple[str, ...],
    optimum: str | None,
    plot: Path | None,
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
    without a number are left out and listed. Exit code 3: the table does not determine the law, or the law does not fit.

    \b
    chinchilla  L = E + A/N^alpha + B/D^beta
    kaplan      L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D
    gadre       L = E + a N^eta + b 6^(eta/2) D^eta
    gamma       L = E + (A/N^alpha + B/D^beta)^gamma
    farseer     L = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) / D^exp(a1 N^alpha + b1)
    repeated    chinchilla with effective tokens of data that are repeated (needs --unique)
    overfitted  repeated, and a loss that rises again when data are repeated too often
    """
    from lmu_dist.scaling.read_table import read_table

    read = read_table(table, n_params, tokens, loss, where, unique_tokens=unique_tokens, run=run, decimal=decimal)

    from lmu_dist.cli.fit_results import Request, fit_one, fit_several  # after the table was read: an error comes at once

    forecasts = bool(predict or at or optimum)
    request = Request(law, fix, tie, predict, at, optimum, plot, resamples, n_params, tokens, unique_tokens, decimal)
    one_law = law not in (None, "all") or (law is None and unique_tokens is None and not forecasts)
    with slow_progress(f"fitting {law or ('chinchilla' if one_law else 'all laws')}"):
        outcome = (fit_one if one_law else fit_several)(read, request)
    if as_json:
        from lmu_dist.scaling.as_json import table_to_json

        show.print_json(table_to_json(read, table, where) | outcome.as_json())
    else:
        show.print_table_notes(read)
        outcome.show()
    return 0 if outcome.determined else 3
