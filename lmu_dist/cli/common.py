"""Shared by all commands: the command group, common arguments and options, and how relative paths are resolved."""

import os
from collections.abc import Sequence
from pathlib import Path

import click

from lmu_dist import __version__, show
from lmu_dist.config import Config, ConfigError, load, with_settings
from lmu_dist.storage import check_reachable

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


def load_config(path: str, overrides: Sequence[str]) -> Config:
    """Loads a configuration, makes its storage path absolute, and checks that the storage is reachable. Raises ConfigError."""
    from lmu_dist.planning.grid import check_families  # imports torch, which --help does not need

    config = load(path, overrides)
    config = with_settings(config, {"storage": resolve_path(config.storage)})
    check_families(config)
    check_reachable(config.storage_folder)
    return config


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
                "this processor has no bfloat16 arithmetic: training in bf16 is slower than in float32 here, without AVX-512 "
                "many times; use train.precision=fp32, or GPUs (cluster.gpus_per_worker=1)"
            ]
        )


def print_notes(notes: Sequence[str]) -> None:
    """Prints notes for the user to stderr."""
    for note in notes:
        show.console.print(f"note: {note}")
