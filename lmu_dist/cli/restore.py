"""The command that writes tables of records back into an MLflow store: restore.

Heavy modules are imported inside the functions, so that --help is fast.
"""

from dataclasses import asdict
from pathlib import Path

import click

from lmu_dist import show
from lmu_dist.cli.common import cli, json_option, print_notes, tracking_uri


@cli.command()
@click.argument("tables", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUNS.csv...")
@json_option
def restore(tables: tuple[Path, ...], as_json: bool) -> None:
    """Write the runs of tables of records into MLflow, after a store was lost.

    The tables are runs.csv of earlier reports; forecasts.csv and position_losses.csv are read from the folder of each. A ladder
    then counts these cells as done, and report, forecast and next use them. Loss curves and checkpoints are not restored.
    Runs that the store has already are not written again.
    """
    from lmu_dist.report.restore import restore as restore_tables
    from lmu_dist.tracking.store import Store
    from lmu_dist.tracking.upload import set_client_limits

    set_client_limits()
    uri = tracking_uri()
    with show.progress_bars() as bars:
        restored = restore_tables(Store(uri), tables, bars.update)
    if as_json:
        show.print_json({"tracking_uri": uri, "tables": [asdict(table) for table in restored]})
        return
    for table in restored:
        print(
            f"{table.experiment}: {table.n_restored:,} runs restored from {table.table}, {table.n_known:,} were there already"
        )
        if table.n_forecasts:
            print(f"{table.experiment}: {table.n_forecasts:,} forecasts restored")
    print_notes([note for table in restored for note in table.notes])
