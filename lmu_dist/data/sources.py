"""Corpus readers: a DataConfig in, corpus shards out; a shard in, its documents and bad records with their locations out.

A corpus shard is what one process reads at a time. `list_shards` gives the shards that identify a corpus, in a fixed order:
several small files, a large file, a member of a tar, or a shard of a Hugging Face data set. Shards are read independently of
each other. Called by data/manifest, which lists them, and by data/splits, data/prepare and data/tokenize_shard, which read.
"""

import functools
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lmu_dist.config import ConfigError, DataConfig, FailedError
from lmu_dist.data.archives import NO_END, is_readable_member, list_tar, read_members, read_tar_stream
from lmu_dist.data.documents import BadRecord, BinaryFile, CorpusShard, Document, UnreadableError
from lmu_dist.data.formats import KNOWN, MEMBER_FORMATS, Format, binary_format, format_of
from lmu_dist.data.hub import dataset_stamp, list_dataset, read_dataset
from lmu_dist.data.paths import SourceFile, file_id, is_url, list_files, network_errors, open_file, stamp_of
from lmu_dist.data.readers import TEXT_DOCUMENT_BYTES, kind_of_stream, read_parquet, read_stream
from lmu_dist.data.streams import CHUNK_BYTES, buffered, byte_range, decompressed, is_full_disk

SHARD_BYTES = 4_000_000  # small files are grouped into shards of about this size
MIN_DOCUMENTS = 400  # text files that would give fewer documents are cut into shorter ones, so that each split has some
MIN_DOCUMENT_BYTES = 256
ENOUGH_FILES = 200  # as many text files are documents enough, however short they are
DAMAGED = "(damaged or empty archive)"  # stands for the member of a tar archive that cannot be read


def list_shards(data: DataConfig) -> list[CorpusShard]:
    """All shards of a corpus in a fixed order.

    Raises ConfigError if there is nothing to read, FailedError if a server does not answer.
    """
    if data.source == "huggingface":
        return list_dataset(data)
    if data.source == "python-stdlib":
        return _shards_of(_stdlib_files(), [], data)
    files, notes = list_files(data.files)
    shards = _shards_of(files, notes, data)
    if not data.validation_files:
        return shards
    held_out, notes = list_files(data.validation_files, "data.validation_files")
    others = {file_id(file.path) for file in files}
    if both := [file.path for file in held_out if file_id(file.path) in others]:
        raise ConfigError(f"data.validation_files: {both[0]} is also one of data.files; take it out of one of the two lists")
    return shards + [replace(shard, split="validation") for shard in _shards_of(held_out, notes, data, "data.validation_files")]


def _shards_of(files: list[SourceFile], notes: list[BadRecord], data: DataConfig, key: str = "data.files") -> list[CorpusShard]:
    """The shards of files that `key` lists. Raises ConfigError if a tar has no member that can be read."""
    notes = list(notes)
    shards: list[CorpusShard] = []
    group: list[SourceFile] = []
    group_bytes = 0
    for file in files:
        if listed_format(file.path) == Format("tar") and not is_url(file.path):
            tar_shards, tar_notes = _tar_shards(file, key)
            shards += tar_shards
            notes += tar_notes
        elif file.size_bytes >= SHARD_BYTES:
            shards.append(_file_shard([file]))
        else:
            group.append(file)
            group_bytes += file.size_bytes
            if group_bytes >= SHARD_BYTES:
                shards.append(_file_shard(group))
                group, group_bytes = [], 0
    shards += [_file_shard(group)] if group else []
    if document_bytes := _document_bytes(files, data):
        shards = [replace(shard, document_bytes=document_bytes) for shard in shards]
    return [replace(shards[0], notes=tuple(notes)), *shards[1:]] if notes else shards


def read(shard: CorpusShard, data: DataConfig) -> Iterator[Document | BadRecord]:
    """Yields the documents and bad records of a shard, in order.

    Raises FailedError if a file has changed since it was listed, or if a server cannot be reached.
    """
    for item in _read(shard, data):
        if isinstance(item, BadRecord) and not item.location.isascii():
            # A name that is not UTF-8 could not be written to the list of bad records.
            item = replace(item, location=os.fsencode(item.location).decode(errors="replace"))
        yield replace(item, split=shard.split) if shard.split and isinstance(item, Document) else item
    check_unchanged(shard)


def check_unchanged(shard: CorpusShard) -> None:
    """Raises FailedError if the shard's files, as this machine sees them, have changed since they were listed."""
    try:
        if shard.shard is not None:
            same = not shard.stamp or dataset_stamp(shard.paths[0]) == shard.stamp
        else:
            same = " ".join(stamp_of(path) for path in shard.paths) == shard.stamp
    except OSError:
        same = False
    if not same:
        raise FailedError(
            f"preparing failed: {shard.paths[0]} on {platform.node()} differs from the file that was listed; do not change the "
            "corpus while it is prepared, and in a cluster put it where all nodes see the same files"
        )


def count_archives(shards: Sequence[CorpusShard]) -> int:
    """The number of archives of a corpus. A compressed file whose name does not say what it holds may be one."""

    def may_be_archive(path: str) -> bool:
        found = listed_format(path)
        return found is not None and found.kind in ("tar", "unknown")

    return len({path for shard in shards for path in shard.paths if shard.member is not None or may_be_archive(path)})


def listed_format(path: str) -> Format | None:
    """The format of a listed file. Source code is listed for python-stdlib only."""
    return format_of(path.partition("?")[0] if is_url(path) else path, MEMBER_FORMATS)


def _read(shard: CorpusShard, data: DataConfig) -> Iterator[Document | BadRecord]:
    yield from shard.notes
    if shard.shard is not None:
        yield from read_dataset(shard, data)
        return
    if shard.member == DAMAGED:
        yield BadRecord(NO_END, shard.paths[0], _misnamed(shard.paths[0]))
        return
    for path in shard.paths:
        try:
            if shard.members:
                yield from read_members(path, shard.members, data, shard.first_line)
            else:
                yield from _read_file(path, shard, data)
        except UnreadableError as e:
            yield BadRecord(str(e), path)
        except OSError as e:
            if is_full_disk(e):  # of temporary files
                raise
            yield BadRecord(f"unreadable: {type(e).__name__}", path)


def _read_file(path: str, shard: CorpusShard, data: DataConfig) -> Iterator[Document | BadRecord]:
    file_format = listed_format(path)
    if file_format is None:
        yield BadRecord("unknown kind of file", path)
        return
    with network_errors(path), open_file(path) as file:
        if file_format.kind == "parquet":
            yield from read_parquet(file, path, data.text_field, shard.row_groups, shard.first_line)
            return
        if file_format.compression:
            stream = decompressed(file, file_format.compression)
        else:
            stream = buffered(byte_range(file, *shard.byte_range) if shard.byte_range else _chunks(file))
        kind, stream = kind_of_stream(stream, file_format.kind)
        if kind == "tar":
            yield from read_tar_stream(stream, path, data)
        else:
            yield from read_stream(stream, kind, path, data, shard.first_line, shard.document_bytes)


def _misnamed(path: str) -> str:
    """What a file is that is no tar, for a message; "" if its first bytes do not show it."""
    with suppress(OSError), open(path, "rb") as file:
        found = binary_format(file.read(512))
        return f"it is {found}; rename it" if found not in (None, "a tar") else ""
    return ""


def _chunks(file: BinaryFile) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


@functools.cache  # a command lists them twice
def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [str(p) for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    return [SourceFile(path, os.path.getsize(path), stamp_of(path)) for path in paths]


def _file_shard(files: list[SourceFile]) -> CorpusShard:
    stamp = " ".join(file.stamp for file in files)
    return CorpusShard(tuple(file.path for file in files), sum(file.size_bytes for file in files), stamp)


def _tar_shards(file: SourceFile, key: str) -> tuple[list[CorpusShard], list[BadRecord]]:
    """One shard per member, in the archive's order, and the notes on other members.

    A damaged archive gets one shard more, which is read as a bad record. Raises ConfigError if no member can hold text.
    """
    path, listing = file.path, list_tar(file.path)
    if listing.members and not any(is_readable_member(m.name) for m in listing.members):
        raise ConfigError(
            f"{key}: none of the {len(listing.members)} files in {path} has a known type, the first is "
            f"{listing.members[0].name}; a tar may hold {KNOWN}"
        )
    shards = [CorpusShard((path,), m.size_bytes, file.stamp, m.name, m.index, members=(m,)) for m in listing.members]
    if not shards or not listing.is_complete:
        shards.append(CorpusShard((path,), 0, file.stamp, DAMAGED))
    return shards, listing.notes


def _document_bytes(files: list[SourceFile], data: DataConfig) -> int:
    """The size of a document into which the text files of a small corpus are cut; 0 if the corpus is large enough as it is."""
    formats = [listed_format(file.path) for file in files]
    if data.validation_files or data.document_separator is not None or not all(f and f.kind == "text" for f in formats):
        return 0
    n_documents = sum(-(-file.size_bytes // TEXT_DOCUMENT_BYTES) for file in files)
    if n_documents >= MIN_DOCUMENTS or len(files) >= ENOUGH_FILES:
        return 0
    return max(MIN_DOCUMENT_BYTES, sum(file.size_bytes for file in files) // MIN_DOCUMENTS)
