"""Storage of corpora and runs: a folder that all nodes share, or a URI such as s3://bucket/prefix.

Both kinds are handled as path objects (pathlib or universal-pathlib). This module holds what differs between them: atomic
writes, downloads, locks, error messages. Called by data, train, tracking and launch.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from lmu_dist.config import ConfigError, Folder

CLOCK_STEP_SECONDS = 0.05  # a file whose last change is longer ago than this gets another time by the next change
STAGING = ".staging-"  # begins the name of a folder for unfinished files; a process that is killed leaves it behind
FULL_BYTES = 1 << 16  # a disk with less free space is full


def check_writable(folder: Folder) -> None:
    """Raises ConfigError if no file can be written to the folder. Called before any work starts."""
    probe = folder / f".writable-{os.getpid()}"
    with _storage_errors(folder, "write to"):
        make_folder(folder)
        probe.write_bytes(b"")
        probe.unlink()


def check_reachable(folder: Folder) -> None:
    """Raises ConfigError if the server behind a URI does not answer. Does nothing for a local folder."""
    if is_remote(folder):
        with _storage_errors(folder, "reach"):
            folder.exists()


@contextmanager
def _storage_errors(folder: Folder, action: str) -> Iterator[None]:
    """Turns any error of the block into a ConfigError: "storage: cannot ACTION FOLDER: REASON"."""
    try:
        yield
    except Exception as e:  # each storage client has its own exception types
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        fix = "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL if the store is not Amazon's"
        raise ConfigError(f"storage: cannot {action} {folder}: {reason}{fix if str(folder).startswith('s3') else ''}") from e


def is_storage_client_error(error: BaseException) -> bool:
    """Whether an exception was raised by a client library of S3 or GCS; these are not subclasses of OSError."""
    return type(error).__module__.partition(".")[0] in ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google")


def error_text(error: BaseException | str) -> str:
    """The message of an error, in one line. A full disk, or a used-up quota, is named as such, with the file to be written."""
    text = " ".join(str(error).split())
    full = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")  # the last one is of SQLite
    match = re.search(rf"({'|'.join(full)})[^:]*(: .*)?", text)
    if match is not None:
        file = re.sub(r"'[^']*' -> ", "", match[2] or "")  # where a file was copied, the error names its source too
        return f"the disk is full{file}; free some space"
    return text or type(error).__name__


@contextmanager
def full_disk_errors(folder: Path) -> Iterator[None]:
    """Raises OSError if the block fails and the disk of a local folder is full: some writers hide why they failed."""
    try:
        yield
    except Exception as e:
        if shutil.disk_usage(folder).free < FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from e
        raise


def is_remote(path: Folder) -> bool:
    """Whether the path is a URI, not a path of the local file system."""
    return not isinstance(path, Path)


def make_folder(folder: Folder) -> None:
    """Creates a local folder and its parents. Does nothing for a URI: object stores have no folders, and a client would
    create a bucket.
    """
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def local_state_dir(folder: Folder) -> Path:
    """A local folder for files that an object store cannot hold: locks, and files that are appended to.

    For a local folder it is the folder itself; for a URI it is a folder in the user's cache, named by the URI's digest.
    """
    if isinstance(folder, Path):
        return folder
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:24]
    return user_cache_path("lmu-dist") / "local-state" / name


def write_atomic(path: Folder, content: bytes) -> None:
    """Writes a file atomically: no reader ever sees a part of it."""
    with open_atomic(path) as file:
        file.write(content)


@contextmanager
def open_atomic(path: Folder) -> Iterator[Any]:
    """Opens a binary file for an atomic write: it appears under its name when the block ends without an error."""
    if isinstance(path, Path):
        partial = path.with_name(path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)  # on a full disk it would take the space that the next attempt needs
            raise
        return
    file: Any = path.fs.open(path.path, "wb", autocommit=False)
    try:
        yield file
    except BaseException:
        with suppress(Exception):  # the error of the block is the one to report
            file.close()
            file.discard()
        raise
    file.close()
    file.commit()


def move_file(local: Path, to: Folder) -> None:
    """Moves a local file to its final path, atomically. A local target must be on the same file system."""
    if isinstance(to, Path):
        local.replace(to)
    else:
        to.fs.put_file(str(local), to.path)
        local.unlink()


@contextmanager
def local_output_dir(folder: Folder) -> Iterator[Path]:
    """A local folder to write output files to. For a URI the files are uploaded when the block ends without an error."""
    if isinstance(folder, Path):
        yield folder
        return
    with TemporaryDirectory(prefix="lmu-dist-") as local:
        yield Path(local)
        for path in sorted(Path(local).iterdir()):
            folder.fs.put_file(str(path), (folder / path.name).path)


@contextmanager
def staging_dir(folder: Folder) -> Iterator[Path]:
    """An empty local folder from which `move_file` can move files into `folder`. Remaining files are deleted at the end."""
    with TemporaryDirectory(dir=folder if isinstance(folder, Path) else None, prefix=STAGING) as local:
        yield Path(local)


def download_file(path: Folder, to: Path) -> None:
    """Downloads a file at a URI to a new local file."""
    assert not isinstance(path, Path)
    to.parent.mkdir(parents=True, exist_ok=True)
    path.fs.get_file(path.path, str(to))


def upload_file(local: Path, to: Folder) -> None:
    """Copies a local file to its final path, where it appears complete. The folder is created if it is missing."""
    make_folder(to.parent)
    if isinstance(to, Path):
        partial = to.with_name(to.name + ".partial")
        try:
            shutil.copyfile(local, partial)
            partial.replace(to)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    else:
        to.fs.put_file(str(local), to.path)


def copy_file(path: Folder, to: Folder) -> None:
    """Copies a file inside a storage. At a URI the server copies it: no byte comes to this machine."""
    if isinstance(path, Path) or isinstance(to, Path):
        assert isinstance(path, Path)
        upload_file(path, to)
    else:
        path.fs.cp_file(path.path, to.path)


def n_bytes(folder: Folder) -> int:
    """The bytes of all files in a folder; 0 if it does not exist."""
    if isinstance(folder, Path):
        return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
    if not folder.exists():
        return 0
    total: Any = folder.fs.du(folder.path)
    return total


def open_for_seeking(path: Folder) -> Any:
    """Opens a file to read small parts of it. At a URI a part is read together with at most 1 MiB that follows it."""
    return open(path, "rb") if isinstance(path, Path) else path.fs.open(path.path, "rb", block_size=1 << 20)


def read_ranges(path: Folder, ranges: Sequence[tuple[int, int]]) -> list[bytearray]:
    """Reads parts of a file, each given by its first byte and the byte after its last one. At a URI, several at a time."""
    if isinstance(path, Path):
        parts = [bytearray(end - begin) for begin, end in ranges]
        with open(path, "rb") as file:
            for (begin, _), part in zip(ranges, parts, strict=True):
                file.seek(begin)
                if file.readinto(part) < len(part):
                    raise OSError(f"{path} ends before byte {begin + len(part)}")
        return parts
    begins, ends = [begin for begin, _ in ranges], [end for _, end in ranges]
    # "raise": a part that cannot be read is an error, not a part of the result.
    return [bytearray(part) for part in path.fs.cat_ranges([path.path] * len(ranges), begins, ends, on_error="raise")]


def cached_path(path: Folder, sha256: str) -> Path:
    """The local path of a file whose content has this sha256. A file at a URI is downloaded once per machine, to a cache.

    The content is verified once per machine and file (`is_intact`). Raises ConfigError if the sha256 is malformed, or if the
    file does not match it.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes a file name
        raise ConfigError(f"{path.parent} has a damaged manifest; delete {path.parent} and prepare again")
    damaged = ConfigError(f"{path} is damaged: its sha256 is not {sha256}; delete {path.parent} and prepare again")
    if isinstance(path, Path):
        if not is_intact(path, sha256):
            raise damaged
        return path
    local = user_cache_path("lmu-dist") / "files" / f"{sha256}{path.suffix}"
    local.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{local}.lock"):
        if not local.exists() or not is_intact(local, sha256):
            partial = local.with_name(local.name + ".partial")
            try:
                path.fs.get_file(path.path, str(partial))
                if digest(partial) != sha256:
                    raise damaged
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                partial.replace(local)
            except BaseException:
                partial.unlink(missing_ok=True)  # on a full disk it would take the space that the next attempt needs
                raise
            remember_intact(local, sha256)
    return local


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a local file has this sha256. The file is read once per machine, and again if its size, times or inode change.

    What was verified is remembered in the user's cache. Several processes wait for the one that reads.
    """
    entry = _verified_entry(path)
    if _read_verified(entry) == [*_identity(path), sha256]:
        return True
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{entry}.lock").acquire()
    except (OSError, NotImplementedError):  # the cache cannot be written, or its file system has no locks
        return digest(path) == sha256
    with lock:
        identity = _identity(path)
        if _read_verified(entry) == [*identity, sha256]:
            return True
        if digest(path) != sha256:
            return False
        _write_verified(entry, path, identity, sha256)
        return True


def remember_intact(path: Path, sha256: str) -> None:
    """Notes that a local file, just written by this process and complete, has this sha256."""
    entry = _verified_entry(path)
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            _write_verified(entry, path, _identity(path), sha256)


def _verified_entry(path: Path) -> Path:
    """The file in the user's cache that says what was verified of a path. Machines may share a cache but not a disk."""
    name = hashlib.sha256(f"{platform.node()} {path.resolve()}".encode()).hexdigest()
    return user_cache_path("lmu-dist") / "verified" / f"{name}.json"


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_verified(entry: Path) -> list[Any] | None:
    try:
        return json.loads(entry.read_text())
    except (OSError, ValueError):
        return None


def _write_verified(entry: Path, path: Path, identity: list[int], sha256: str) -> None:
    """Writes an entry, unless the file has changed since `identity` was taken."""
    # A file system keeps times in steps of some milliseconds. A change in the step of the last one would not be seen.
    if (age := time.time() - identity[2] / 1e9) < CLOCK_STEP_SECONDS:
        time.sleep(min(CLOCK_STEP_SECONDS, CLOCK_STEP_SECONDS - age))
    if _identity(path) == identity:
        with suppress(OSError):
            write_atomic(entry, json.dumps([*identity, sha256]).encode())


def remove(folder: Folder) -> None:
    """Deletes a folder and its contents, if it exists."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)


def digest(path: Folder, begin: int = 0, end: int | None = None) -> str:
    """The sha256 of a file, or of its bytes `begin` to `end` - 1, as hex."""
    sha = hashlib.sha256()
    if end is None:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                sha.update(chunk)
    else:
        for at in range(begin, end, 1 << 24):
            [chunk] = read_ranges(path, [(at, min(at + (1 << 24), end))])
            sha.update(chunk)
    return sha.hexdigest()
