"""What would be submitted to a cluster: a Config and a working directory in, a Draft of a job out; nothing is sent.

Which files travel is decided by Ray's own packaging, asked here without packing anything. Called by `lmu-dist submit`, which
hands the draft to launch/jobs.
"""

import glob
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

from lmu_dist.config import Config, ConfigError, sources, to_dict
from lmu_dist.launch.cell import git_commit
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import grid
from lmu_dist.tracking.store import check_no_password

# An interrupted driver says so in MLflow, which Ray's SIGTERM and its three seconds leave no time for.
STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
SECRET = re.compile(r"AWS_\w*(KEY|SECRET|TOKEN)\w*|MLFLOW_TRACKING_(USERNAME|PASSWORD|TOKEN)")

logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)  # else it names every ignore file it meets, and more


@dataclass(frozen=True)
class Package:
    """The files of a working directory, by their path in it, with their size in bytes."""

    folder: Path
    files: dict[str, int]
    excludes: tuple[str, ...]  # what git ignores by rules that Ray does not know
    left_out: dict[str, int]  # by git or .rayignore; a folder of which nothing travels is one entry that ends in /

    @property
    def size_bytes(self) -> int:
        """Of all that travels; Ray packs without compression."""
        return sum(self.files.values())

    def digest(self) -> str:
        """sha256 of names and contents. Not Ray's own hash, in which an ignored folder counts as soon as it is there."""
        sha = hashlib.sha256()
        for name in sorted(self.files):
            with open(self.folder / name, "rb") as file:
                sha.update(f"{name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()


@dataclass(frozen=True)
class Draft:
    """A job as it would be submitted. `name` says what it is by its content: command, experiment, digest."""

    name: str
    entrypoint: str
    package: Package
    metadata: dict[str, str]
    environment: dict[str, str]
    notes: tuple[str, ...]


def draft(config: Config, path: Path, overrides: Iterable[str], command: str | None, folder: Path) -> Draft:
    """Works out and checks all of a job without a cluster. Raises ConfigError.

    `config` is what `path` and the overrides make. `command`: ladder, tune or train; None: what the configuration has a section
    for. `folder`: the working directory, which travels.
    """
    command = command or ("ladder" if config.ladder else "tune" if config.tune else "train")
    if command != "train" and getattr(config, command) is None:
        raise ConfigError(f"--command {command}: this configuration has no section {command}")
    tokenizer = config.data.tokenizer.path
    if tokenizer is None or Path(tokenizer).is_file():  # else it is the cluster's, and what it holds is not known here
        grid(config, vocab_tokens(config))
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    check_no_password(tracking_uri)
    # What only this machine can reach would lead the job to itself.
    elsewhere = urlsplit(tracking_uri).hostname not in (None, "localhost", "127.0.0.1", "::1")
    environment = STOPPING | ({"MLFLOW_TRACKING_URI": tracking_uri} if elsewhere else {})
    package = _pack(folder)
    job = _check_travels(package, config, path)
    words = ["python", "-m", "lmu_dist.cli", command, job, *overrides]
    if command == "tune":  # the job's own folder goes when the job has gone
        words += ["-o", f"{config.storage}/{config.experiment}-tuned.yaml"]
    content = json.dumps([words, to_dict(config), package.digest(), environment], sort_keys=True)
    commit = git_commit(folder)
    return Draft(
        name=f"{command}-{config.experiment}-{hashlib.sha256(content.encode()).hexdigest()[:8]}",
        entrypoint=shlex.join(words),
        package=package,
        metadata={
            "job_name": f"{command} {config.experiment}",
            "command": command,
            "experiment": config.experiment,
            "config": job,
            "git_commit": commit.rstrip("+"),
            "git_dirty": str(commit.endswith("+")).lower(),
        },
        environment=environment,
        notes=tuple(_notes(config, environment)),
    )


def _notes(config: Config, environment: Mapping[str, str]) -> Iterable[str]:
    where = "in $LMU_DIST_HOME of the cluster's nodes, else in ~/lmu-dist on the head"
    if "://" not in config.storage and not Path(config.storage).expanduser().is_absolute():
        yield f"storage {config.storage!r} will be {where}; several nodes need a folder that all of them share, or a URI"
    if "MLFLOW_TRACKING_URI" not in environment:
        yield "no MLFLOW_TRACKING_URI that others could reach: the cluster's own is taken, else a file beside its storage"
    if kept := sorted(name for name in os.environ if SECRET.fullmatch(name)):
        yield f"not sent, since all who see the dashboard could read it: {', '.join(kept)}; set it on the cluster's nodes"


def _pack(folder: Path) -> Package:
    """Looks at what of a folder travels. Raises ConfigError if it is more than Ray takes."""
    excludes = _ignored_by_git(folder)
    usual = _get_excludes(folder, get_runtime_env_default_excludes())  # .git, .venv and the like
    unusual = _get_excludes(folder, list(excludes))
    files: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            files[str(path.relative_to(folder))] = path.stat().st_size

    honours_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(folder, [usual, unusual], take, include_gitignore=honours_gitignore)
    package = Package(folder, files, excludes, _left_out(folder, files, usual))
    if package.size_bytes >= GCS_STORAGE_MAX_SIZE:
        largest = ", ".join(sorted(files, key=lambda name: -files[name])[:3])
        raise ConfigError(
            f"{folder} holds {package.size_bytes / 1e6:,.0f} MB and Ray takes {GCS_STORAGE_MAX_SIZE / 1e6:,.0f} MB; put "
            f"what the job can do without into .gitignore or .rayignore; the largest are {largest}"
        )
    return package


def _ignored_by_git(folder: Path) -> tuple[str, ...]:
    """Patterns for what git ignores here, by rules of folders above and of the user too, which Ray does not read."""
    if os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") == "1":
        return ()
    command = ["git", "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no work tree
        return ()
    return tuple("/" + re.sub(r"([*?!#[ ])", r"\\\1", name) for name in sorted(filter(None, done.stdout.split("\0"))))


def _check_travels(package: Package, config: Config, path: Path) -> str:
    """The name of the configuration file in the package. Raises ConfigError if it, or a file it names, would not be there."""
    for source in sources(path):
        _check(package, "the configuration", source)
    tokenizer = config.data.tokenizer
    for key, pattern in (
        *(("data.files", pattern) for pattern in config.data.files),
        ("data.tokenizer.path", tokenizer.path),
        ("data.tokenizer.vocab_path", tokenizer.vocab_path),
        ("data.tokenizer.merges_path", tokenizer.merges_path),
    ):
        if pattern is None or Path(pattern).is_absolute():
            continue  # an absolute path is one of the cluster's
        found = glob.glob(pattern, root_dir=package.folder, recursive=True)
        if not found:
            raise ConfigError(f"{key}: {pattern} is not in {package.folder}; give a path that all nodes of the cluster have")
        for name in found:
            if not (package.folder / name).is_dir():
                _check(package, key, package.folder / name)
    return _within(package, path)


def _check(package: Package, what: str, path: Path) -> None:
    name = _within(package, path)
    if Path(name).parts[0] == "..":
        raise ConfigError(f"{what}: {path} lies outside {package.folder}, which is what is submitted; move it there")
    if name not in package.files:
        raise ConfigError(f"{what}: {path} would not be sent, since .gitignore or .rayignore names it; take it out of there")


def _within(package: Package, path: Path) -> str:
    return os.path.relpath(path.absolute(), package.folder)


def _left_out(folder: Path, files: Iterable[str], usual: Callable[[Path], bool]) -> dict[str, int]:
    kept, travelling = {Path()}, set(files)
    kept.update(parent for name in travelling for parent in Path(name).parents)
    left_out: Counter[str] = Counter()
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not usual(Path(root, name))]
        for name in names:
            path = Path(root, name)
            inside = path.relative_to(folder)
            if str(inside) not in travelling and not usual(path):
                top = next((parent for parent in reversed(inside.parents) if parent not in kept), None)
                left_out[f"{top}/" if top else str(inside)] += path.lstat().st_size
    return dict(left_out)
