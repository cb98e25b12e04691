"""Tar archives: a path in, the members with their positions out; a member in, its records out.

The headers of an uncompressed local tar are read once, and each member is then read by its position. A compressed or remote tar
is read from its start to its end. Called by data/sources.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from lmu_dist.config import DataConfig
from lmu_dist.data.documents import BadRecord, BinaryFile, TarMember, UnreadableError
from lmu_dist.data.formats import MEMBER_FORMATS, format_of, reason_to_leave_out
from lmu_dist.data.readers import Record, kind_of_stream, read_stream
from lmu_dist.data.streams import buffered, byte_range, decompressed, is_full_disk

NO_END = "unreadable: the archive is truncated or damaged, or has no members"
UNKNOWN = "unknown kind of file"


@dataclass(frozen=True)
class Listing:
    """The regular files of a tar, notes on its other members, and whether the archive is complete."""

    members: list[TarMember]
    notes: list[BadRecord]
    is_complete: bool


def list_tar(path: str) -> Listing:
    """Lists an uncompressed tar, or several that follow each other in one file. Reads the headers only."""
    members, notes = list[TarMember](), list[BadRecord]()
    complete = False
    try:
        with open(path, "rb") as file, _open_tar(file, "r:") as (tar, ended):
            for index, info in enumerate(tar):
                if info.isfile():
                    offset = None if info.issparse() else info.offset_data
                    members.append(TarMember(info.name, index, offset, info.size))
                elif note := _note(info, path):
                    notes.append(note)
            complete = ended()
    except (OSError, EOFError, tarfile.TarError):
        pass
    return Listing(members, notes, complete)


def read_members(path: str, members: Sequence[TarMember], data: DataConfig, first_line: int = 1) -> Iterator[Record]:
    """Yields the records of some members of an uncompressed tar, or of a part of one, whose first line has a number then."""
    with open(path, "rb") as file:
        for member in members:
            location = f"{path}!{member.name}"
            try:
                yield from _read_member(file, member, location, data, first_line)
            except OSError as e:
                if is_full_disk(e):  # of temporary files
                    raise
                yield BadRecord(f"unreadable: {type(e).__name__}", location)


def _read_member(file: BinaryFile, member: TarMember, location: str, data: DataConfig, first_line: int) -> Iterator[Record]:
    if member.offset is not None:
        content = buffered(byte_range(file, member.offset, member.offset + member.size_bytes))
        yield from _read_content(content, member.name, location, data, first_line)
        return
    file.seek(0)
    with _open_tar(file, "r:") as (tar, _):
        content = tar.extractfile(next(info for index, info in enumerate(tar) if index == member.index))
        yield from _read_content(cast(io.BufferedReader, content), member.name, location, data)


def read_tar_stream(stream: BinaryFile, path: str, data: DataConfig) -> Iterator[Record]:
    """Yields the records of all members of a tar that is read from its start to its end."""
    try:
        with _open_tar(stream, "r|") as (tar, ended):
            n_members = 0
            for info in tar:
                cast(Any, tar).members = []  # tarfile would keep the header of every member
                if not info.isfile():
                    note = _note(info, path)
                    yield from [note] if note else []
                    continue
                n_members += 1
                content = cast(io.BufferedReader, tar.extractfile(info))
                yield from _read_content(content, info.name, f"{path}!{info.name}", data)
            if not n_members or not ended():
                yield BadRecord(NO_END, path)
    except tarfile.TarError:
        yield BadRecord(NO_END, path)


def is_readable_member(name: str) -> bool:
    """Whether a member is of a known kind and is not left out by its name."""
    return format_of(name, MEMBER_FORMATS) is not None and reason_to_leave_out(name) is None


def _read_content(
    content: io.BufferedReader, name: str, location: str, data: DataConfig, first_line: int = 1
) -> Iterator[Record]:
    file_format = format_of(name, MEMBER_FORMATS)
    if reason := reason_to_leave_out(name):
        yield BadRecord(reason, location)
    elif file_format is None or file_format.kind == "tar":
        hidden = os.path.basename(name).startswith(".")
        yield BadRecord("left out: hidden file" if hidden else UNKNOWN, location)
    else:
        try:
            stream = decompressed(content, file_format.compression) if file_format.compression else content
            kind, stream = kind_of_stream(stream, file_format.kind)
            if kind == "tar":
                yield BadRecord("unknown kind of file: an archive inside an archive", location)
            else:
                yield from read_stream(stream, kind, location, data, first_line)
        except UnreadableError as e:
            yield BadRecord(str(e), location)


def _note(info: tarfile.TarInfo, path: str) -> BadRecord | None:
    """The note on a member that is not a regular file; None for a folder, which holds nothing itself."""
    if info.isdir():
        return None
    if info.islnk():
        return BadRecord(f"left out: the same file as {info.linkname}", f"{path}!{info.name}")
    return BadRecord("left out: a link" if info.issym() else "left out: a device or pipe", f"{path}!{info.name}")


@contextmanager
def _open_tar(file: BinaryFile, mode: Any) -> Iterator[tuple[tarfile.TarFile, Callable[[], bool]]]:
    """Opens a tar and a function that says whether the last archive in it has an end, once all members were read.

    tarfile stops at the first end of an archive; with `ignore_zeros` it goes on, but then it skips damaged headers silently. So
    this class of headers raises where one is damaged.
    """
    state = {"ended": False}

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: Any, encoding: str, errors: str) -> tarfile.TarInfo:
            try:
                info = super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as e:
                if buf and not buf.strip(b"\0") and len(buf) == tarfile.BLOCKSIZE:
                    state["ended"] = True
                elif buf:
                    raise tarfile.ReadError(f"damaged header: {e}") from e
                raise
            state["ended"] = False
            return info

    with tarfile.open(fileobj=cast(Any, file), mode=mode, tarinfo=Header, ignore_zeros=True) as tar:
        yield tar, lambda: state["ended"]
