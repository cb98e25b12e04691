"""The files of a corpus: the entries of `data.files`, or of `data.validation_files`, in; a sorted list of files out.

An entry is a path, a folder, a glob or a URL (s3://, gs://, http://, ...). Files come with sizes and stamps. Called by
data/sources, data/manifest and data/divide.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fsspec.core import url_to_fs

from lmu_dist.config import ConfigError, FailedError
from lmu_dist.data.documents import BadRecord, UnreadableError
from lmu_dist.data.formats import KNOWN, format_of, reason_to_leave_out
from lmu_dist.storage import error_text

LOCAL_SCHEMES = ("file://", "local://")  # URLs of the local file system
# What file systems call the things that change with the content of a file.
VERSIONS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "LastModified", "Last-Modified", "mtime", "updated", "created")
# How the classes of errors of Python, aiohttp and botocore are called that say that a server does not answer.
UNREACHABLE = {"ConnectionError", "TimeoutError", "ClientConnectionError", "HTTPClientError"}


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: an absolute path or a URL, its size, and a stamp that changes when its content may have changed."""

    path: str
    size_bytes: int
    stamp: str


def list_files(entries: Sequence[str], key: str = "data.files") -> tuple[list[SourceFile], list[BadRecord]]:
    """All files that the entries name, sorted by path, each once; and notes on what was left out.

    Raises ConfigError, which names `key`, if an entry names nothing, or names a file of an unknown type; nothing has been read
    by then. Raises FailedError if a server does not answer.
    """
    files, notes = dict[str, SourceFile](), list[BadRecord]()
    try:
        for entry in entries:
            found, left_out = _list_url(entry) if is_url(entry) else _list_local(local_path(entry))
            files |= {file.path: file for file in found}
            notes += left_out
        return _each_once(files, notes, entries)
    except (ConfigError, FailedError) as e:
        raise type(e)(f"{key}: {e}") from e
    except OSError as e:
        raise ConfigError(f"{key}: cannot list {e.filename}: {e.strerror or e}; make it readable, or leave it out") from e


def file_id(path: str) -> tuple[int, int] | str:
    """What two paths of the same file have in common: device and inode, or the URL."""
    status = None if is_url(path) else os.stat(path)
    return (status.st_dev, status.st_ino) if status and status.st_ino else path


def _each_once(
    files: dict[str, SourceFile], notes: list[BadRecord], entries: Sequence[str]
) -> tuple[list[SourceFile], list[BadRecord]]:
    """The files sorted by path, without links to others of them, and the notes without those on files that are read."""
    unique, first_paths = list[SourceFile](), dict[tuple[int, int] | str, str]()
    for path, file in sorted(files.items()):
        first = first_paths.setdefault(file_id(path), path)
        if first != path:
            notes.append(BadRecord(f"left out: the same file as {first}", path))
            continue
        unique.append(file)
    if not unique:
        raise ConfigError(f"{' '.join(entries)} has nothing but files that are left out ({notes[0].reason})")
    paths = {file.path for file in unique}
    return unique, [note for note in dict.fromkeys(notes) if note.location not in paths]


def is_url(path: str) -> bool:
    """Whether a path is a URL, which is read by fsspec, and not a path of the local file system."""
    return "://" in path and not path.lower().startswith(LOCAL_SCHEMES)


def local_path(entry: str) -> str:
    """The path that an entry of `data.files` names, if `is_url` is false: without file://, and with the home for ~."""
    scheme = next((scheme for scheme in LOCAL_SCHEMES if entry.lower().startswith(scheme)), "")
    return os.path.expanduser(entry[len(scheme) :])


def open_file(path: str) -> Any:
    """Opens a file of the corpus for reading. Raises OSError, or FailedError for a URL that cannot be opened."""
    if not is_url(path):
        return open(path, "rb")
    with network_errors(path):
        fs, inner = url_to_fs(path)
        return fs.open(inner, "rb")


@contextmanager
def network_errors(path: str) -> Iterator[None]:
    """Turns errors of reading a URL into a FailedError: the file may be intact, and the command can be run again."""
    try:
        yield
    except (ConfigError, FailedError, UnreadableError):
        raise
    except Exception as e:  # each client of a store has its own exception types
        if not is_url(path):
            raise
        raise FailedError(f"reading {path} failed: {error_text(e)[:200]}") from e


def stamp_of(path: str) -> str:
    """Size and modification time (for a URL: entity tag or the like) of a file. Raises OSError, or FailedError for a URL."""
    if not is_url(path):
        status = os.stat(path)
        return f"{status.st_size}:{status.st_mtime_ns}"
    with network_errors(path):
        fs, inner = url_to_fs(path)
        fs.invalidate_cache()
        return _remote_file(fs, inner, fs.info(inner)).stamp


def _list_local(path: str) -> tuple[list[SourceFile], list[BadRecord]]:
    if os.path.isdir(path):
        return _list_folder(path)
    if os.path.lexists(path):  # also a path with brackets, which would be a glob otherwise
        if not os.path.isfile(path):
            raise ConfigError(f"{path} is a broken link, or no regular file; give the path of a file")
        if format_of(path) is None:
            raise _unknown_type(path)
        return [_local_file(path)], []
    return _list_glob(path, sorted(glob.glob(path, recursive=True)))


def _list_glob(entry: str, paths: list[str]) -> tuple[list[SourceFile], list[BadRecord]]:
    if not paths:
        raise ConfigError(
            f"no file matches {entry!r} (from {os.getcwd()}); correct the path or glob, or take it out of the list"
        )
    files, notes = list[SourceFile](), list[BadRecord]()
    for path in paths:
        if os.path.isdir(path):
            if "**" not in entry:
                notes.append(BadRecord("left out: a folder; name it in the list of files to read it", os.path.abspath(path)))
        elif reason := _reason_for(path):
            notes.append(BadRecord(reason, os.path.abspath(path)))
        elif format_of(path) is None:
            raise _unknown_type(path)
        else:
            files.append(_local_file(path))
    if not files and not notes:
        raise ConfigError(f"{entry!r} matches folders only; give globs that match files, or name the folders")
    return files, notes


def _list_folder(folder: str) -> tuple[list[SourceFile], list[BadRecord]]:
    """All files of known formats below a folder. Hidden files and folders are skipped, as by globs."""
    files, notes, visited = list[SourceFile](), list[BadRecord](), set[tuple[int, int]]()

    def fail(error: OSError) -> None:
        raise ConfigError(f"cannot list {error.filename}: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder that was visited, perhaps to one around itself
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(parent, name)
            reason = _reason_for(path) or ("left out: unknown file type" if format_of(name) is None else None)
            if reason:
                notes.append(BadRecord(reason, os.path.abspath(path)))
            else:
                files.append(_local_file(path))
    if not files:
        raise ConfigError(f"the folder {folder} has no file of a known type ({KNOWN})")
    return files, notes


def _reason_for(path: str) -> str | None:
    """Why a file that a glob or folder holds is left out, or None."""
    if not os.path.isfile(path):
        return "left out: a broken link" if os.path.islink(path) else "left out: a device or pipe"
    return reason_to_leave_out(path)


def _local_file(path: str) -> SourceFile:
    path = os.path.abspath(path)
    return SourceFile(path, os.path.getsize(path), stamp_of(path))


def _unknown_type(path: str) -> ConfigError:
    return ConfigError(f"{path} has an unknown file type; give files and globs of {KNOWN} only")


def _list_url(entry: str) -> tuple[list[SourceFile], list[BadRecord]]:
    """The files of a URL: one file, all of known formats below a folder, or those that match a glob. Lists it once."""
    if "@" in entry.split("://")[1].split("/")[0]:
        raise ConfigError("a URL holds credentials; give them in the environment (AWS_*), not in the URL")
    try:
        fs, path = url_to_fs(entry)
    except (ImportError, ValueError) as e:
        reason = error_text(e)[:200]
        raise ConfigError(f"{entry} cannot be used: {reason}; install its library (s3fs, gcsfs)") from e
    try:
        entries, is_exact = _remote_entries(fs, path)
        if not entries:
            raise ConfigError(f"no file matches {entry!r}; correct the URL or glob, or take it out of the list")
        if is_exact and format_of(_name(path)) is None:
            raise _unknown_type(entry)
        files, notes = list[SourceFile](), list[BadRecord]()
        for name, info in sorted(entries.items()):
            url = fs.unstrip_protocol(name)
            reason = None if is_exact else reason_to_leave_out(_name(name))
            if reason or format_of(_name(name)) is None:
                notes.append(BadRecord(reason or "left out: unknown file type", url))
            else:
                files.append(_remote_file(fs, name, info))
    except ConfigError:
        raise
    except Exception as e:  # each client of a store has its own exception types
        error = FailedError if {c.__name__ for c in type(e).__mro__} & UNREACHABLE else ConfigError
        raise error(f"cannot list {entry}: {error_text(e)[:200]}") from e
    if not files:
        raise ConfigError(f"{entry} has no file of a known type ({KNOWN})")
    return files, notes


def _remote_entries(fs: Any, path: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """The files at a path of a remote file system by name, and whether the path names one file exactly."""
    try:
        info = None if path.endswith("/") else fs.info(path)
    except FileNotFoundError as e:
        if e.__cause__ is not None and not glob.has_magic(path):  # over HTTP, also if the server does not answer
            raise e.__cause__ from e
        info = None
    except Exception:
        if not glob.has_magic(path):  # a server may refuse a path with a * in any way
            raise
        info = None
    if info is not None and info.get("type") == "file":
        return {path: info}, True
    if info is not None or path.endswith("/"):
        entries = fs.find(path, detail=True)
    else:
        entries = fs.glob(path, detail=True) if glob.has_magic(path) else {}
    return {name: i for name, i in entries.items() if i.get("type") == "file"}, False


def _remote_file(fs: Any, name: str, info: dict[str, Any]) -> SourceFile:
    if info.get("size") is None or not any(key in info for key in VERSIONS):  # a listing over HTTP has names only
        info = fs.info(name)
    version = next((info[key] for key in VERSIONS if info.get(key)), "")
    # Some file systems give a time as a number in a listing, and as a datetime for one file.
    version = version.timestamp() if isinstance(version, datetime) else version
    return SourceFile(fs.unstrip_protocol(name), info.get("size") or 0, f"{info.get('size')}:{version}")


def _name(path: str) -> str:
    """The path of a URL without the query, which may follow the name of a file."""
    return path.partition("?")[0]
