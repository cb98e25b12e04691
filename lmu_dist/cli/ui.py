"""The command `ui`: opens the runs of an experiment on MLflow's web pages.

Heavy modules are imported inside the functions, so that --help is fast.
"""

from contextlib import suppress

import click

from lmu_dist import show
from lmu_dist.cli.common import cli, tracking_uri


@cli.command()
@click.argument("experiment", required=False)
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port to listen on.  [default: any free port]")
def ui(experiment: str | None, port: int) -> None:
    """Show the runs of EXPERIMENT, with their loss curves, on MLflow's web pages.

    Prints the link to open in a browser, and serves the pages until Ctrl-C. If MLFLOW_TRACKING_URI is the URL of a server, it
    only prints the link.
    """
    from lmu_dist.tracking.experiments import prepare_pages
    from lmu_dist.tracking.pages import experiments_path, runs_path
    from lmu_dist.tracking.store import existing_store
    from lmu_dist.tracking.upload import set_client_limits

    set_client_limits()
    store = existing_store(tracking_uri())
    path = experiments_path() if experiment is None else runs_path(prepare_pages(store, experiment))
    if store.is_server:
        print(f"{store.uri.rstrip('/')}/{path}")
        return
    from lmu_dist.tracking.server import serve

    def on_ready(url: str) -> None:
        print(f"{url}/{path}", flush=True)
        show.console.print("open this link in a browser; Ctrl-C ends the server")

    show.console.print(f"starting MLflow's pages for {store.uri} ...")
    with suppress(KeyboardInterrupt):
        serve(store, port, on_ready)
