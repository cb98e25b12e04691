"""What the commands share: the group they belong to, their arguments, and what names are relative to."""

import os
from collections.abc import Sequence
from pathlib import Path

import click

from lmu_dist import __version__, show
from lmu_dist.config import Config, ConfigError, load, with_settings
from lmu_dist.storage import check_reachable

job = click.argument("config")
settings = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Train LMU language models on Ray and DeepSpeed, recorded by MLflow.

    CONFIG is a YAML file such as jobs/train.yaml; KEY=VALUE overrides one of its keys, as in train.learning_rate=1e-3.
    """


def root() -> str:
    """What relative names of storage and results are relative to: $LMU_DIST_HOME, else this folder, unless it is that of a Ray
    job, which Ray deletes.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return os.environ.get("LMU_DIST_HOME") or str(Path.home() / "lmu-dist" if in_job else Path.cwd())


def place(name: str) -> str:
    """A name of the user's as an absolute path, or as the URI it is."""
    return name if "://" in name or Path(name).expanduser().is_absolute() else f"{root().rstrip('/')}/{name}"


def loaded(path: str, overrides: Sequence[str]) -> Config:
    """A configuration whose storage is where this command keeps things. Raises ConfigError."""
    config = load(path, overrides)
    config = with_settings(config, {"storage": place(config.storage)})
    check_reachable(config.storage_folder)
    return config


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, else an SQLite file where this command keeps things."""
    from lmu_dist.tracking.store import default_uri

    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    if "://" in root():
        raise ConfigError(f"set MLFLOW_TRACKING_URI: no database can be at LMU_DIST_HOME, {root()}")
    folder = Path(root())
    folder.mkdir(parents=True, exist_ok=True)
    return default_uri(folder)


def tell(notes: Sequence[str]) -> None:
    """Prints what a person should know, to stderr."""
    for note in notes:
        show.console.print(f"note: {note}")
