"""Commands for clusters: submit and jobs for one elsewhere, cluster for one on this machine. Heavy imports are inside."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmu_dist import show
from lmu_dist.cli.common import as_json, cli, job, settings, tell
from lmu_dist.config import load

if TYPE_CHECKING:
    from lmu_dist.launch.jobs import Client

at = click.option("--address", metavar="URL", help="The cluster's dashboard; else $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS.")


@cli.command()
@job
@settings
@at
@click.option(
    "--command", type=click.Choice(["ladder", "tune", "train"]), help="Default: what CONFIG has a section for, else train."
)
@click.option("--follow", is_flag=True, help="Print the job's log until it ends; Ctrl-C leaves the job running.")
def submit(config: str, overrides: tuple[str, ...], address: str | None, command: str | None, follow: bool) -> int:
    """Send the current folder to a cluster and run a command there as a Ray job; the same again goes on with it."""
    merged = load(config, overrides)
    from lmu_dist.launch import jobs as cluster
    from lmu_dist.launch.submission import draft

    drafted = draft(merged, Path(config), overrides, command, Path.cwd())
    show.package(drafted.package)
    tell(drafted.notes)
    client = cluster.connect(address)
    name, new = cluster.submit(client, drafted)
    print(f"job         {name}{'' if new else ', there already with the same content: not submitted again'}")
    if follow:
        return _follow(client, name)
    print(f"follow      lmu-dist jobs follow {name} --address {client.get_address()}")
    return 0


@cli.group()
def jobs() -> None:
    """The jobs of a cluster: list, follow and stop them."""


@jobs.command("list")
@at
@as_json
def list_jobs(address: str | None, as_json: bool) -> None:
    """All jobs the cluster knows, latest first."""
    from lmu_dist.launch.jobs import connect, listed

    rows = listed(connect(address))
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        show.jobs(rows)


@jobs.command("follow")
@click.argument("name", metavar="ID")
@at
def follow_job(name: str, address: str | None) -> int:
    """Print a job's log until it ends, whatever happens to the connection; Ctrl-C leaves the job running.

    Exit code: 0 it succeeded, 1 it did not, or is not followed to its end.
    """
    from lmu_dist.launch.jobs import connect

    return _follow(connect(address), name)


@jobs.command("stop")
@click.argument("name", metavar="ID")
@at
def stop_job(name: str, address: str | None) -> None:
    """Interrupt a job, as Ctrl-C would, and wait for its end."""
    from lmu_dist.launch.jobs import connect, stop

    show.job(stop(connect(address), name))


@cli.group()
def cluster() -> None:
    """A cluster of several Ray nodes on this machine, with a token, and MLflow beside it."""


cluster_folder = click.option(
    "--folder", default=".cluster", show_default=True, type=click.Path(path_type=Path), help="Where its token and logs are."
)
port = click.IntRange(1024, 65535)


@cluster.command()
@cluster_folder
@click.option("--nodes", default=2, show_default=True, type=click.IntRange(1, 250), help="Beside the head, which has no CPUs.")
@click.option("--cpus", default=1, show_default=True, type=click.IntRange(1), help="Of each node.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address on which dashboard and MLflow listen.")
@click.option("--port", default=6379, show_default=True, type=port, help="Of Ray.")
@click.option("--dashboard-port", default=8265, show_default=True, type=port, help="Of the dashboard and the Jobs API.")
@click.option("--mlflow-port", default=5000, show_default=True, type=port)
def up(folder: Path, **settings: Any) -> None:
    """Start what does not run of it; prints what to say in the shell that will use it: eval "$(lmu-dist cluster up)"."""
    from lmu_dist.launch import local
    from lmu_dist.launch.parts import Settings

    show.cluster(local.up(folder, Settings(**settings), show.console.print), local.exports(folder))


@cluster.command(name="status")
@cluster_folder
def cluster_status(folder: Path) -> int:
    """What runs of it; exit 1 if something does not."""
    from lmu_dist.launch import local

    parts = local.status(folder)
    show.cluster(parts, local.exports(folder))
    return 0 if all(part.state == "alive" for part in parts) else 1


@cluster.command()
@cluster_folder
def down(folder: Path) -> None:
    """End it, and nothing else on this machine; token, logs, and what MLflow has, stay."""
    from lmu_dist.launch import local

    print(f"ended {', '.join(local.down(folder)) or 'nothing: it did not run'}")


def _follow(client: "Client", name: str) -> int:
    """Follows a job to its end. Exit code 0 if it succeeded."""
    from lmu_dist.launch.jobs import follow

    try:
        ended = follow(client, name, show.log, lambda said: tell([said]))
    except KeyboardInterrupt:
        tell([f"the job goes on; lmu-dist jobs follow {name} --address {client.get_address()} follows it again"])
        return 1
    if ended is None:
        tell([f"the cluster was started anew and knows no {name}: submit the same again, it goes on from what is on record"])
        return 1
    show.job(ended)
    return 0 if ended.status == "SUCCEEDED" else 1
