"""The command `clean`: says which checkpoints, or cached files, no run needs any more, and deletes them.

Heavy modules are imported inside the functions, so that --help is fast.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lmu_dist import show
from lmu_dist.cli.common import cli, json_option, print_notes, tracking_uri
from lmu_dist.config import ConfigError

if TYPE_CHECKING:
    from lmu_dist.launch.clean import Cleaning


@cli.command()
@click.argument("experiment", required=False)
@click.option("--cache", is_flag=True, help="Also, or without EXPERIMENT only, this machine's copies in ~/.cache/lmu-dist.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@json_option
def clean(experiment: str | None, cache: bool, yes: bool, as_json: bool) -> None:
    """Free storage that no run of EXPERIMENT needs any more.

    These are the optimizer states of runs that have ended, and branch points that no planned run starts from. Weights stay, for
    generate and export, and so does the latest branch point of every trunk, for larger budgets. Says what it would delete, then
    asks; without a terminal it deletes with --yes only.
    """
    if experiment is None and not cache:
        raise ConfigError("give the name of an experiment, or --cache")
    found = _clean(experiment, cache, delete=False)
    delete = yes
    if not as_json:
        _print_items(found)
        print_notes(found.left)
        if found.items and not yes and sys.stdin.isatty() and show.console.is_terminal:
            delete = click.confirm("delete these?", err=True)
    if delete and found.items:
        found = _clean(experiment, cache, delete=True)
    if as_json:
        show.print_json({"deleted": delete, "bytes": found.n_bytes, **asdict(found)})
    elif delete:
        print(f"freed {_size(found.n_bytes)}")
    elif found.items:
        print_notes(["nothing was deleted; the same command with --yes deletes"])


def _clean(experiment: str | None, cache: bool, delete: bool) -> "Cleaning":
    from lmu_dist.launch import clean as cleaning
    from lmu_dist.tracking.store import existing_store
    from lmu_dist.tracking.upload import set_client_limits

    set_client_limits()
    parts = [cleaning.clean(existing_store(tracking_uri()), experiment, delete)] if experiment is not None else []
    parts += [cleaning.clean_cache(delete)] if cache else []
    items, left = (item for part in parts for item in part.items), (reason for part in parts for reason in part.left)
    return cleaning.Cleaning(tuple(items), tuple(left))


def _print_items(found: "Cleaning") -> None:
    rows: Sequence[tuple[str, int, str]] = [(item.kind, item.n_bytes, item.path) for item in found.items]
    for kind, n_bytes, path in rows:
        print(f"{kind:<17}{_size(n_bytes):>12}  {path}")
    print(f"{'in all':<17}{_size(found.n_bytes):>12}" if rows else "there is nothing to free")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"
