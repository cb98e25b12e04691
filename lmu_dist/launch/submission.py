"""Makes the JobSpec that `lmu-dist submit` sends to a cluster, from a Config and a working directory. Sends nothing.

Ray's packaging code decides which files are uploaded; here it lists them without packing. launch/jobs submits the result.
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
from lmu_dist.models import registry
from lmu_dist.planning.cost import vocab_tokens
from lmu_dist.planning.grid import all_references, grid
from lmu_dist.tracking.passwords import check_no_password

# An interrupted driver closes its MLflow runs. Ray's default, SIGTERM and three seconds, leaves no time for that.
STOP_SETTINGS = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
RESULT_FILE = re.compile(r"mlflow\.db(-\w+)?|.*\.(safetensors|pt)")  # MLflow's database, weights and shards of checkpoints
RESULT_FOLDERS = ("mlartifacts", "mlruns")
RESULT_MARKERS = ("owner_id", "report.html", "pyvenv.cfg")  # of a storage folder, a report, a virtual environment
SECRET = re.compile(r"AWS_\w*(KEY|SECRET|TOKEN)\w*|MLFLOW_TRACKING_(USERNAME|PASSWORD|TOKEN)")

logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)  # it logs every ignore file


@dataclass(frozen=True)
class Package:
    """The files of a working directory that are uploaded with a job."""

    folder: Path
    files: dict[str, int]  # size in bytes, by the path in the folder
    excludes: tuple[str, ...]  # patterns of results, and of files that git ignores by rules that Ray does not read
    left_out: dict[str, int]  # size of files not uploaded, by path; a folder of which nothing is uploaded is one entry, NAME/

    @property
    def size_bytes(self) -> int:
        """The size of the uploaded files; Ray does not compress them."""
        return sum(self.files.values())

    def digest(self) -> str:
        """sha256 of names and contents. Ray's own hash would change when an ignored folder appears."""
        sha = hashlib.sha256()
        for name in sorted(self.files):
            with open(self.folder / name, "rb") as file:
                sha.update(f"{name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()


@dataclass(frozen=True)
class JobSpec:
    """A job that is ready to be submitted. Its name identifies its content: command, experiment, digest."""

    name: str
    entrypoint: str
    package: Package
    metadata: dict[str, str]
    environment: dict[str, str]
    notes: tuple[str, ...]


def make_job_spec(config: Config, path: Path, overrides: Iterable[str], command: str | None, folder: Path) -> JobSpec:
    """Makes and checks the specification of a job, without a cluster. Raises ConfigError.

    `config`: the configuration in `path` with the overrides. `command`: ladder, tune or train; None: the one the configuration
    has a section for. `folder`: the working directory, which is uploaded.
    """
    command = command or ("ladder" if config.ladder else "tune" if config.tune else "train")
    if command != "train" and getattr(config, command) is None:
        raise ConfigError(f"--command {command}: this configuration has no section {command}")
    tokenizer = config.data.tokenizer.path
    if tokenizer is None or Path(tokenizer).is_file():  # else the file is on the cluster and cannot be read here
        grid(config, vocab_tokens(config))
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    check_no_password(tracking_uri)
    # A loopback address or a local file would mean another server on the cluster.
    is_reachable = urlsplit(tracking_uri).hostname not in (None, "localhost", "127.0.0.1", "::1")
    environment = STOP_SETTINGS | ({"MLFLOW_TRACKING_URI": tracking_uri} if is_reachable else {})
    _check_storage(config.storage)
    package = _list_package(folder, folder / config.storage)
    config_name = _check_included(package, config, path)
    argv = ["python", "-m", "lmu_dist.cli", command, config_name, *overrides]
    if command == "tune":  # in storage, because Ray deletes the job's working directory
        argv += ["-o", f"{config.storage}/{config.experiment}-tuned.yaml"]
    content = json.dumps([argv, to_dict(config), package.digest(), environment], sort_keys=True)
    commit = git_commit(folder)
    return JobSpec(
        name=f"{command}-{config.experiment}-{hashlib.sha256(content.encode()).hexdigest()[:8]}",
        entrypoint=shlex.join(argv),
        package=package,
        metadata={
            "job_name": f"{command} {config.experiment}",
            "command": command,
            "experiment": config.experiment,
            "config": config_name,
            "git_commit": commit.rstrip("+"),
            "git_dirty": str(commit.endswith("+")).lower(),
        },
        environment=environment,
        notes=tuple(_notes(config, environment)),
    )


def _notes(config: Config, environment: Mapping[str, str]) -> Iterable[str]:
    where = "in $LMU_DIST_HOME on the cluster's nodes, or in ~/lmu-dist on the head if that is not set"
    if "://" not in config.storage and not Path(config.storage).expanduser().is_absolute():
        yield f"storage {config.storage!r} will be {where}; several nodes need a folder that all of them share, or a URI"
    if "MLFLOW_TRACKING_URI" not in environment:
        yield "MLFLOW_TRACKING_URI is no server that the cluster can reach; the job uses that of the cluster, or an SQLite file"
    if kept := sorted(name for name in os.environ if SECRET.fullmatch(name)):
        yield f"not sent, because all users of the dashboard could read it: {', '.join(kept)}; set it on the cluster's nodes"


def _check_storage(storage: str) -> None:
    if "://" not in storage and os.path.normpath(storage).split(os.sep)[0] == "..":
        raise ConfigError(
            f"storage: {storage} leads out of the folder that a job has for relative paths, LMU_DIST_HOME of the nodes; "
            "give the absolute path that it has on the nodes, or a URI"
        )


def _list_package(folder: Path, storage: Path) -> Package:
    """Lists the files of a folder that are uploaded. Raises ConfigError if they are larger than Ray accepts.

    Results are left out, also where no git says so: the `storage` of the configuration, and what `_is_result` finds.
    """
    excludes = (*_ignored_by_git(folder), *map(_pattern, _results(folder, storage)))
    default_excludes = _get_excludes(folder, get_runtime_env_default_excludes())  # .git, .venv and so on
    git_excludes = _get_excludes(folder, list(excludes))
    files: dict[str, int] = {}

    def add_file(path: Path) -> None:
        if path.is_file():
            files[str(path.relative_to(folder))] = path.stat().st_size

    use_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(folder, [default_excludes, git_excludes], add_file, include_gitignore=use_gitignore)
    package = Package(folder, files, excludes, _left_out(folder, files, default_excludes))
    if package.size_bytes >= GCS_STORAGE_MAX_SIZE:
        largest = ", ".join(sorted(files, key=lambda name: -files[name])[:3])
        raise ConfigError(
            f"{folder} has {package.size_bytes / 1e6:,.0f} MB of files to upload, and Ray accepts less than "
            f"{GCS_STORAGE_MAX_SIZE / 1e6:,.0f} MB; list the files that the job does not need in .gitignore or .rayignore; "
            f"the largest are {largest}"
        )
    return package


def _ignored_by_git(folder: Path) -> tuple[str, ...]:
    """Patterns of the files that git ignores here. Ray does not read the ignore rules of parent folders and of the user."""
    if os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") == "1":
        return ()
    command = ["git", "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or this is not a work tree
        return ()
    return tuple(map(_pattern, sorted(filter(None, done.stdout.split("\0")))))


def _pattern(name: str) -> str:
    """The pattern, as in .gitignore, that matches only the file or folder with this path in the working directory."""
    return "/" + re.sub(r"([*?!#[ ])", r"\\\1", name)


def _results(folder: Path, storage: Path) -> list[str]:
    """The paths of results and of virtual environments in a working directory; a folder is listed without what is in it."""
    found = list[str]()
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in (".git", "__pycache__"))  # Ray leaves them out
        for name in list(folders):
            if _is_result(Path(root, name)) or os.path.abspath(Path(root, name)) == os.path.abspath(storage):
                found.append(os.path.relpath(Path(root, name), folder))
                folders.remove(name)
        found += [os.path.relpath(Path(root, name), folder) for name in sorted(names) if RESULT_FILE.fullmatch(name)]
    return found


def _is_result(folder: Path) -> bool:
    """Whether a folder holds results of lmu-dist or of MLflow, or is a virtual environment."""
    return folder.name in RESULT_FOLDERS or any((folder / name).is_file() for name in RESULT_MARKERS)


def _check_included(package: Package, config: Config, path: Path) -> str:
    """Returns the path of the configuration file in the package. Raises ConfigError if a file the job needs is not in it."""
    for source in sources(path):
        _check_file(package, "the configuration", source)
    for reference in filter(registry.is_file_reference, all_references(config)):
        if Path(reference).is_absolute():
            raise ConfigError(f"family {reference}: give its path relative to {package.folder}, so that it is uploaded")
        _check_file(package, "the family", package.folder / reference.rpartition(":")[0])
    tokenizer = config.data.tokenizer
    for key, pattern in (
        *(("data.files", pattern) for pattern in config.data.files),
        *(("data.validation_files", pattern) for pattern in config.data.validation_files),
        ("data.tokenizer.path", tokenizer.path),
        ("data.tokenizer.vocab_path", tokenizer.vocab_path),
        ("data.tokenizer.merges_path", tokenizer.merges_path),
    ):
        if pattern is None or "://" in pattern or Path(pattern).expanduser().is_absolute():
            continue  # a URL, or an absolute path, which is a path on the cluster
        found = glob.glob(pattern, root_dir=package.folder, recursive=True)
        if not found:
            raise ConfigError(f"{key}: {pattern} is not in {package.folder}; give a path that all nodes of the cluster have")
        for name in found:
            if not (package.folder / name).is_dir():
                _check_file(package, key, package.folder / name)
    return _relative_path(package, path)


def _check_file(package: Package, key: str, path: Path) -> None:
    name = _relative_path(package, path)
    if Path(name).parts[0] == "..":
        raise ConfigError(f"{key}: {path} lies outside the submitted folder {package.folder}; move it there")
    if name not in package.files:
        raise ConfigError(
            f"{key}: {path} would not be sent, because .gitignore or .rayignore lists it (remove it there), or because it lies "
            "among results, such as runs, reports and checkpoints (move it)"
        )


def _relative_path(package: Package, path: Path) -> str:
    return os.path.relpath(path.absolute(), package.folder)


def _left_out(folder: Path, files: Iterable[str], is_excluded: Callable[[Path], bool]) -> dict[str, int]:
    """The sizes of the files that are not uploaded, except those that Ray excludes by default."""
    parents, included = {Path()}, set(files)
    parents.update(parent for name in included for parent in Path(name).parents)
    left_out: Counter[str] = Counter()
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_excluded(Path(root, name))]
        for name in names:
            path = Path(root, name)
            relative = path.relative_to(folder)
            if str(relative) not in included and not is_excluded(path):
                top = next((parent for parent in reversed(relative.parents) if parent not in parents), None)
                left_out[f"{top}/" if top else str(relative)] += path.lstat().st_size
    return dict(left_out)
