"""The command that says which planned cells are worth their price: next.

Heavy modules are imported inside the functions, so that --help is fast.
"""

from typing import Literal

import click

from lmu_dist import show
from lmu_dist.cli.common import cli, json_option, print_notes, tracking_uri


@cli.command(name="next")
@click.argument("experiment")
@click.option(
    "--ask",
    default="factor",
    show_default=True,
    metavar="factor|alpha|beta|loss=N,D",
    help="What is to be known better: the data-efficiency factor at the largest size, an exponent, or the loss at N and D.",
)
@click.option("--family", metavar="F", help="Ask about this family only; by default about every family of the plan.")
@click.option(
    "--baseline",
    metavar="F",
    help="Family that a factor compares the others with; by default as of report.",
)
@click.option("--count", default=5, show_default=True, type=click.IntRange(1), help="Number of cells to print.")
@click.option("--per", type=click.Choice(["flops", "hours"]), default="flops", show_default=True, help="What a cell costs.")
@json_option
def next_command(
    experiment: str,
    ask: str,
    family: str | None,
    baseline: str | None,
    count: int,
    per: Literal["flops", "hours"],
    as_json: bool,
) -> None:
    """Print which planned cells would narrow an interval most for their price.

    EXPERIMENT has the plan of a ladder in MLflow, from its first start on. Each row takes the rows above it as done. An
    interval is given as the ratio of its ends.
    """
    from lmu_dist.planning.proposal import propose
    from lmu_dist.tracking.store import existing_store
    from lmu_dist.tracking.upload import set_client_limits

    set_client_limits()
    proposal = propose(existing_store(tracking_uri()), experiment, ask, family, count, per, baseline)
    if as_json:
        show.print_json(proposal.to_json())
        return
    print_notes(proposal.notes)
    for line in proposal.lines():
        print(line)
