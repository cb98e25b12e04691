"""Where corpora and runs lie: a folder that all nodes see, or a URI such as s3://bucket/prefix. Paths in, paths out.

Both kinds are handled as paths; here is what differs between them. Called by data, train, tracking and launch.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from lmu_dist.config import ConfigError, Folder


def check_writable(folder: Folder) -> None:
    """Raises ConfigError if nothing can be put there: better now than after hours of work."""
    probe = folder / f".writable-{os.getpid()}"
    with _answering(folder, "write to"):
        make_folder(folder)
        probe.write_bytes(b"")
        probe.unlink()


def check_reachable(folder: Folder) -> None:
    """Raises ConfigError if a URI does not answer; of a folder nothing is asked."""
    if is_remote(folder):
        with _answering(folder, "reach"):
            folder.exists()


@contextmanager
def _answering(folder: Folder, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # every kind of storage has errors of its own
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        where = "; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, unless it is Amazon's, AWS_ENDPOINT_URL"
        raise ConfigError(f"storage: cannot {what} {folder}: {reason}{where if str(folder).startswith('s3') else ''}") from e


def is_from_storage(error: BaseException) -> bool:
    """Whether an error that is no OSError comes from the client of a storage at a URI."""
    return type(error).__module__.partition(".")[0] in ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google")


def is_remote(path: Folder) -> bool:
    """Whether it is a URI, and not a folder of this machine."""
    return not isinstance(path, Path)


def make_folder(folder: Folder) -> None:
    """Makes a folder, and those above it; at a URI there is nothing to make, and a client would make a bucket."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def beside(folder: Folder) -> Path:
    """A folder of this machine for what cannot be at a URI: locks, and files that grow. Of a local folder, itself."""
    if isinstance(folder, Path):
        return folder
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:24]
    return user_cache_path("lmu-dist") / "beside" / name


def write_whole(path: Folder, content: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    with writing(path) as file:
        file.write(content)


@contextmanager
def writing(path: Folder) -> Iterator[Any]:
    """A binary file to write to, which appears under its name, whole, when the block ends without an error."""
    if isinstance(path, Path):
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return
    file: Any = path.fs.open(path.path, "wb", autocommit=False)
    try:
        yield file
    except BaseException:
        with suppress(Exception):  # what matters is the error of the block
            file.close()
            file.discard()
        raise
    file.close()
    file.commit()


def put(local: Path, to: Folder) -> None:
    """Moves a file of this machine to its place, where it appears at once. A local place is on the same disk."""
    if isinstance(to, Path):
        local.replace(to)
    else:
        to.fs.put_file(str(local), to.path)
        local.unlink()


@contextmanager
def local_first(folder: Folder) -> Iterator[Path]:
    """A folder of this machine to write files to; those at a URI are copied there when the block ends without an error."""
    if isinstance(folder, Path):
        yield folder
        return
    with TemporaryDirectory(prefix="lmu-dist-") as local:
        yield Path(local)
        for path in sorted(Path(local).iterdir()):
            folder.fs.put_file(str(path), (folder / path.name).path)


@contextmanager
def staging(folder: Folder) -> Iterator[Path]:
    """An empty folder of this machine from where files can be `put` into `folder`; what stays in it is deleted."""
    with TemporaryDirectory(dir=folder if isinstance(folder, Path) else None, prefix=".staging-") as local:
        yield Path(local)


def fetch_folder(folder: Folder, to: Path) -> None:
    """Copies a folder at a URI, with all that is in it, to a new folder of this machine."""
    assert not isinstance(folder, Path)
    to.mkdir(parents=True)
    folder.fs.get(f"{folder.path.rstrip('/')}/", f"{to}/", recursive=True)


def fetched(path: Folder, sha256: str) -> Path:
    """The file on this machine: itself, or a copy that is made once on each, known by its digest. Raises ConfigError."""
    if isinstance(path, Path):
        return path
    if not re.fullmatch("[0-9a-f]{64}", sha256):  # it names a file here
        raise ConfigError(f"{path.parent} has a damaged manifest; delete {path.parent} and prepare again")
    local = user_cache_path("lmu-dist") / "files" / f"{sha256}{path.suffix}"
    if not local.exists():
        local.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{local}.lock"):
            if not local.exists():
                partial = local.with_name(local.name + ".partial")
                path.fs.get_file(path.path, str(partial))
                if digest(partial) != sha256:
                    partial.unlink()
                    raise ConfigError(f"{path} is damaged: its sha256 is not {sha256}; delete {path.parent} and prepare again")
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                partial.replace(local)
    return local


def remove(folder: Folder) -> None:
    """Deletes a folder and all in it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)


def digest(path: Folder) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while chunk := file.read(1 << 22):
            sha.update(chunk)
    return sha.hexdigest()
