"""Shared by all commands: the command group, common arguments and options, and how relative paths are resolved."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmu_dist import __version__, show
from lmu_dist.config import Config, ConfigError, Folder, load, open_folder, parse, with_overrides, with_settings
from lmu_dist.storage import check_reachable, local_output_dir

if TYPE_CHECKING:
    from lmu_dist.report.write import ReportFiles

config_argument = click.argument("config")
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
family_option = click.option(
    "--family",
    metavar="FILE.py:CLASS",
    help="The family of the model, if it is not built in. Its code is executed: only use code that you trust.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Compare the data efficiency of language-model architectures: train grids of models, fit scaling laws, write reports.

    CONFIG is a YAML file such as jobs/train.yaml. KEY=VALUE overrides one of its keys, as in train.learning_rate=1e-3.
    """


def base_folder() -> str:
    """Returns the folder for relative paths of storage and results: $LMU_DIST_HOME, or else the current folder.

    Inside a Ray job it is ~/lmu-dist instead of the current folder, which Ray deletes after the job.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return os.environ.get("LMU_DIST_HOME") or str(Path.home() / "lmu-dist" if in_job else Path.cwd())


def resolve_path(name: str) -> str:
    """Returns a path given by the user as an absolute path; a URI stays as it is.

    Raises ConfigError if a relative path leads out of a base folder that is not the current folder: in a shell `../runs` says
    where it is, in a Ray job, or below $LMU_DIST_HOME, it would be a place that nobody named.
    """
    if "://" in name:
        return name
    if Path(name).expanduser().is_absolute():
        return os.path.normpath(Path(name).expanduser())
    base = base_folder().rstrip("/") or "/"
    if os.path.normpath(name).split(os.sep)[0] == ".." and base != str(Path.cwd()):
        absolute = "s3://bucket/runs" if "://" in base else os.path.normpath(f"{base}/{name}")
        raise ConfigError(
            f"{name} leads out of {base}, the folder for relative paths; give the absolute path, such as {absolute}"
        )
    return f"{base}/{name}" if "://" in base else os.path.normpath(f"{base}/{name}")


def _check_storage(storage: str) -> None:
    """Raises ConfigError for a relative storage outside of the folder of the command, and for a URI with one slash."""
    if re.match(r"[a-z][a-z0-9+.-]*:/(?!/)", storage):
        raise ConfigError(f"storage: {storage} is neither a path nor a URI; a URI has two slashes, as in s3://bucket/runs")
    path = Path(storage).expanduser()
    if "://" not in storage and not path.is_absolute() and os.path.normpath(path).split(os.sep)[0] == "..":
        raise ConfigError(
            f"storage: {storage} leads out of {base_folder()}, where a job or another machine would not look for it; give the "
            f"absolute path, such as {os.path.abspath(path)}"
        )


def load_config(path: str, overrides: Sequence[str]) -> Config:
    """Loads a configuration, makes its storage path absolute, and checks that the storage is reachable. Raises ConfigError."""
    from lmu_dist.planning.grid import check_families  # imports torch, which --help does not need

    config = load(path, overrides)
    _check_storage(config.storage)
    config = with_settings(config, {"storage": resolve_path(config.storage)})
    check_families(config)
    check_reachable(config.storage_folder)
    return config


def load_config_or_run(name: str, overrides: Sequence[str]) -> Config:
    """Loads a configuration, or that of a run by what its tables print of it. Raises ConfigError."""
    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        return load_config(name, overrides)
    from lmu_dist.train.kept_weights import newest_model

    try:
        folder = run_folder(name)
    except ConfigError as e:
        raise ConfigError(f"{name} is neither a YAML file such as jobs/train.yaml nor a run: {e}") from e
    _, meta, _ = newest_model(folder)
    if meta is None:
        raise ConfigError(f"{folder} has no checkpoint to go on from; give the YAML file of the run")
    config = with_settings(parse(meta.config), {"storage": str(folder.parent.parent)})
    return with_overrides(config, overrides)


def run_folder(run: str) -> Folder:
    """Returns the given folder, or the folder of the run in MLflow with this name, key or id."""
    if "://" in run or Path(run).expanduser().is_dir():
        return open_folder(run)
    from lmu_dist.tracking.names import folder_of
    from lmu_dist.tracking.store import existing_store
    from lmu_dist.tracking.upload import set_client_limits

    set_client_limits()
    try:
        store = existing_store(tracking_uri())
    except ConfigError as e:
        raise ConfigError(f"there is no folder {run!r}, and {e}") from e
    return folder_of(store, run)


def tracking_uri() -> str:
    """Returns $MLFLOW_TRACKING_URI, or else the URI of an SQLite file in the base folder."""
    from lmu_dist.tracking.store import default_uri

    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    if "://" in base_folder():
        raise ConfigError(
            f"set MLFLOW_TRACKING_URI, since LMU_DIST_HOME is a URI, {base_folder()}, which cannot hold a database"
        )
    return default_uri(Path(base_folder()))


def print_precision_note(config: Config) -> None:
    """Says so before anything starts if runs would be in bf16 on this machine's processor and it has no products of bf16."""
    tuned = [entry.settings for entry in config.ladder.tuned] if config.ladder else []
    searched = config.tune.space.get("train.precision") if config.tune and not config.ladder else None
    precisions = {config.train.precision, *(settings.get("train.precision") for settings in tuned)}
    precisions.update((searched.choice or ()) if searched else ())
    is_elsewhere = config.cluster.address or os.environ.get("RAY_ADDRESS")  # on processors that this one says nothing about
    if "bf16" not in precisions or config.cluster.gpus_per_worker or is_elsewhere:
        return
    from lmu_dist.models.precision import has_bfloat16_products

    if not has_bfloat16_products():
        print_notes(
            [
                "this processor has no bfloat16 arithmetic: it stores bfloat16 and multiplies in float32, which is no faster "
                "than train.precision=fp32; GPUs (cluster.gpus_per_worker=1) are"
            ]
        )


def print_notes(notes: Sequence[str]) -> None:
    """Prints notes for the user to stderr."""
    for note in notes:
        show.console.print(f"note: {note}")


def write_report_files(
    source: str | Sequence[Path],
    output: str,
    any_code: bool = False,
    baseline: str | None = None,
    family: str | None = None,
) -> "ReportFiles":
    """Writes a report to a folder, and shows the progress. `source`: an experiment in MLflow, or tables of records."""
    from lmu_dist.report.write import write_report, write_report_from_tables
    from lmu_dist.tracking.store import existing_store
    from lmu_dist.tracking.upload import set_client_limits

    set_client_limits()
    with show.progress_bars() as bars, local_output_dir(open_folder(resolve_path(output))) as folder:
        if not isinstance(source, str):
            return write_report_from_tables(source, folder, any_code, bars.update, baseline=baseline, family=family)
        store = existing_store(tracking_uri())
        return write_report(store, source, folder, any_code, bars.update, baseline=baseline, family=family)
