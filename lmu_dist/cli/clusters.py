"""Commands for clusters: `submit` and `jobs` for a remote cluster, `cluster` for one on this machine.

Heavy modules are imported inside the functions, so that --help is fast.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmu_dist import show
from lmu_dist.cli.common import cli, config_argument, json_option, overrides_argument, print_notes
from lmu_dist.config import load

if TYPE_CHECKING:
    from lmu_dist.launch.jobs import JobsClient

address_option = click.option(
    "--address", metavar="URL", help="URL of the Ray dashboard. Default: $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS."
)


@cli.command()
@config_argument
@overrides_argument
@address_option
@click.option(
    "--command",
    type=click.Choice(["ladder", "tune", "train"]),
    help="Command to run. Default: ladder or tune if CONFIG has that section, else train.",
)
@click.option("--follow", is_flag=True, help="Print the log of the job until it ends. Ctrl-C leaves the job running.")
def submit(config: str, overrides: tuple[str, ...], address: str | None, command: str | None, follow: bool) -> int:
    """Run a command on a cluster as a Ray job.

    Uploads the current folder. A second submission with the same content continues the first one.
    """
    merged = load(config, overrides)
    from lmu_dist.launch.address import dashboard_address

    address = dashboard_address(address)  # before anything slow
    from lmu_dist.launch import jobs as cluster
    from lmu_dist.launch.submission import make_job_spec

    job_spec = make_job_spec(merged, Path(config), overrides, command, Path.cwd())
    show.print_package(job_spec.package)
    print_notes(job_spec.notes)
    client = cluster.connect(address)
    name, new = cluster.submit(client, job_spec)
    print(f"job         {name}{'' if new else ' exists already with the same content, so it was not submitted again'}")
    if follow:
        return _follow(client, name)
    print(f"follow      lmu-dist jobs follow {name} --address {client.get_address()}")
    return 0


@cli.group()
def jobs() -> None:
    """List, follow and stop the jobs of a cluster."""


@jobs.command("list")
@address_option
@json_option
def list_jobs(address: str | None, as_json: bool) -> None:
    """List all jobs of the cluster, latest first."""
    from lmu_dist.launch.jobs import connect, fetch_jobs

    rows = fetch_jobs(connect(address))
    if as_json:
        show.print_json([asdict(row) for row in rows])
    else:
        show.print_jobs(rows)


@jobs.command("follow")
@click.argument("name", metavar="ID")
@address_option
def follow_job(name: str, address: str | None) -> int:
    """Print the log of a job until it ends; reconnects if the connection breaks. Ctrl-C leaves the job running.

    Exit code: 0 if the job succeeded; 1 if it failed or could not be followed to its end.
    """
    from lmu_dist.launch.jobs import connect

    return _follow(connect(address), name)


@jobs.command("stop")
@click.argument("name", metavar="ID")
@address_option
def stop_job(name: str, address: str | None) -> None:
    """Interrupt a job, as Ctrl-C would, and wait until it has ended."""
    from lmu_dist.launch.jobs import connect, stop

    show.print_job(stop(connect(address), name))


@cli.group()
def cluster() -> None:
    """Start and stop a small cluster of Ray nodes on this machine.

    It has an MLflow server, and a token protects it.
    """


cluster_folder = click.option(
    "--folder", default=".cluster", show_default=True, type=click.Path(path_type=Path), help="Folder of the token and the logs."
)
port = click.IntRange(1024, 65535)


@cluster.command()
@cluster_folder
@click.option(
    "--nodes",
    default=2,
    show_default=True,
    type=click.IntRange(1, 250),
    help="Worker nodes, in addition to the head, which has no CPUs.",
)
@click.option("--cpus", default=1, show_default=True, type=click.IntRange(1), help="CPUs of each worker node.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address on which the dashboard and MLflow listen.")
@click.option("--port", default=6379, show_default=True, type=port, help="Port of Ray.")
@click.option("--dashboard-port", default=8265, show_default=True, type=port, help="Port of the dashboard and the Jobs API.")
@click.option("--mlflow-port", default=5000, show_default=True, type=port, help="Port of the MLflow server.")
def up(folder: Path, **settings: Any) -> None:
    """Start the cluster, or those of its processes that do not run.

    Prints the environment variables for the shell that will use it: eval "$(lmu-dist cluster up)".
    """
    from lmu_dist.launch import local
    from lmu_dist.launch.local_commands import LocalClusterSettings

    show.print_cluster(local.up(folder, LocalClusterSettings(**settings), show.console.print), local.exports(folder))


@cluster.command(name="status")
@cluster_folder
def cluster_status(folder: Path) -> int:
    """Print the state of the cluster's processes; exit code 1 if one does not run."""
    from lmu_dist.launch import local

    parts = local.status(folder)
    show.print_cluster(parts, local.exports(folder))
    return 0 if all(part.state == "alive" for part in parts) else 1


@cluster.command()
@cluster_folder
def down(folder: Path) -> None:
    """Stop the cluster and no other process; token, logs and the data of MLflow remain."""
    from lmu_dist.launch import local

    print(f"stopped {', '.join(local.down(folder)) or 'nothing: the cluster was not running'}")


def _follow(client: "JobsClient", name: str) -> int:
    """Follows a job to its end and returns the exit code: 0 if it succeeded, else 1."""
    from lmu_dist.launch.jobs import follow

    try:
        ended = follow(client, name, show.print_log, lambda note: print_notes([note]))
    except KeyboardInterrupt:
        print_notes(
            [f"the job keeps running; to follow it again: lmu-dist jobs follow {name} --address {client.get_address()}"]
        )
        return 1
    if ended is None:
        print_notes(
            [f"the cluster was restarted and has no job {name}; submit the same job again to continue from its records"]
        )
        return 1
    show.print_job(ended)
    return 0 if ended.status == "SUCCEEDED" else 1
