"""Prints a submission, the jobs of a cluster, and the processes of a local one. Used by cli/."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmu_dist.show.tables import duration, new_table, print_table, size

if TYPE_CHECKING:  # these imports are slow, and only needed for annotations
    from lmu_dist.launch.jobs import ClusterJob
    from lmu_dist.launch.local import ClusterProcess
    from lmu_dist.launch.submission import Package


def print_package(package: "Package") -> None:
    """Prints which files a submission uploads, and which it leaves out."""
    print(f"uploads     {len(package.files):,} files, {size(package.size_bytes)}, from {package.folder}")
    if package.left_out:
        names = sorted(package.left_out, key=lambda name: -package.left_out[name])
        some = ", ".join(f"{name} ({size(package.left_out[name])})" for name in names[:5])
        more = f", and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"left out    ignored by git or Ray, or results: {some}{more}")


def print_jobs(rows: "Sequence[ClusterJob]") -> None:
    """Prints the table of the jobs of a cluster."""
    table = new_table("job", "status", "started (UTC)", "time", "config", "commit", "remark")
    for row in rows:
        commit = row.git_commit[:8] + "+" * row.git_dirty
        started = row.started.removesuffix("+00:00").replace("T", " ")
        table.add_row(row.id, row.status, started, duration(row.seconds), row.config, commit, row.message)
    print_table(table)


def print_job(job: "ClusterJob") -> None:
    """Prints the status of a job."""
    print(f"job         {job.id} {job.status} after {duration(job.seconds)}{f': {job.message}' if job.message else ''}")


def print_log(text: str) -> None:
    """Prints a piece of a log unchanged."""
    print(text, end="", flush=True)


def print_cluster(processes: "Sequence[ClusterProcess]", exports: Mapping[str, str]) -> None:
    """Prints a local cluster as shell lines: its environment variables, and the state of its processes as comments."""
    for process in processes:
        print(f"# {process.name:<9} {process.state:<7}{f' pid {process.pid}' if process.pid else ''}")
    for name, value in exports.items():
        print(f"export {name}={shlex.quote(value)}")
    print("unset RAY_AUTH_TOKEN  # it would take precedence over the token file")
