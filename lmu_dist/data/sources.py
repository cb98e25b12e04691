"""Corpus readers: a DataConfig in, corpus shards out, each an iterator of documents and bad records with their locations.

A corpus shard is what one process reads at a time. `list_shards` gives the shards that identify a corpus: several small files,
a large file, a member of a tar, or a shard of a Hugging Face data set. `split_shards` divides and joins them to shards of
similar size for the work. Both have a fixed order; shards are read independently of each other. Called by data/prepare.
"""

import io
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lmu_dist.config import ConfigError, DataConfig, FailedError
from lmu_dist.data.archives import NO_END, is_readable_member, list_tar, read_members, read_tar_stream
from lmu_dist.data.documents import BadRecord, BinaryFile, CorpusShard, Document, TarMember, UnreadableError, counts_as_bad
from lmu_dist.data.formats import KNOWN, MEMBER_FORMATS, Format, format_of, kind_of_content, reason_to_leave_out
from lmu_dist.data.hub import dataset_stamp, list_dataset, read_dataset
from lmu_dist.data.paths import SourceFile, is_url, list_files, network_errors, open_file, stamp_of
from lmu_dist.data.readers import TEXT_DOCUMENT_BYTES, read_parquet, read_stream, text_pieces
from lmu_dist.data.streams import CHUNK_BYTES, WIDE_MARKS, buffered, byte_range, decompressed

__all__ = [
    "BadRecord",
    "CorpusShard",
    "Document",
    "TarMember",
    "check_unchanged",
    "counts_as_bad",
    "list_shards",
    "read",
    "split_shards",
]

SHARD_BYTES = 4_000_000  # small files are grouped into shards of about this size
BLOCK_BYTES = 4_000_000  # a large file is divided into parts of about this size; a kill loses one per process
MAX_BLOCKS = 1000  # a very large file is divided into at most about as many parts
MIN_DOCUMENTS = 400  # text files that would give fewer documents are cut into shorter ones, so that each split has some
MIN_DOCUMENT_BYTES = 256
ENOUGH_FILES = 200  # as many text files are documents enough, however short they are
DAMAGED = "(damaged or empty archive)"  # stands for the member of a tar archive that cannot be read
Progress = Callable[[str, int, int], None]  # called with: activity, bytes done, total bytes


def list_shards(data: DataConfig) -> list[CorpusShard]:
    """All shards of a corpus in a fixed order. Raises ConfigError if there is nothing to read."""
    if data.source == "huggingface":
        return list_dataset(data)
    files, notes = (_stdlib_files(), []) if data.source == "python-stdlib" else list_files(data)
    shards: list[CorpusShard] = []
    group: list[SourceFile] = []
    group_bytes = 0
    for file in files:
        if _format(file.path) == Format("tar") and not is_url(file.path):
            tar_shards, tar_notes = _tar_shards(file)
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


def split_shards(shards: list[CorpusShard], data: DataConfig, progress: Progress | None = None) -> list[CorpusShard]:
    """The same documents in the same order, in shards of similar size: large files are divided, small members of tars joined.

    Reads large text files once, to find the beginnings of lines and documents.
    """
    result: list[CorpusShard] = []
    total, done = sum(s.size_bytes for s in shards), 0
    for _, same_file in groupby(shards, lambda s: s.paths):
        group, group_bytes = list[CorpusShard](), 0  # small members of the same tar
        for shard in same_file:
            parts = _divided(shard, data)
            is_small_member = bool(shard.members) and len(parts) == 1
            if group and (not is_small_member or group_bytes >= SHARD_BYTES):
                result.append(_joined(group))
                group, group_bytes = [], 0
            if is_small_member:
                group.append(shard)
                group_bytes += shard.size_bytes
            else:
                result += parts
            done += shard.size_bytes
            if progress:
                progress("listing", done, total)
        result += [_joined(group)] if group else []
    return result


def read(shard: CorpusShard, data: DataConfig) -> Iterator[Document | BadRecord]:
    """Yields the documents and bad records of a shard, in order.

    Raises FailedError if a file has changed since it was listed, or if a server cannot be reached.
    """
    for item in _read(shard, data):
        if isinstance(item, BadRecord) and not item.location.isascii():
            # A name that is not UTF-8 could not be written to the list of bad records.
            item = replace(item, location=os.fsencode(item.location).decode(errors="replace"))
        yield item
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
            f"preparing failed: {shard.paths[0]} on {platform.node()} differs from the file that was listed; put the corpus "
            "where all nodes see the same files, and do not change it while it is prepared; then run the same command again"
        )


def _read(shard: CorpusShard, data: DataConfig) -> Iterator[Document | BadRecord]:
    yield from shard.notes
    if shard.shard is not None:
        yield from read_dataset(shard, data)
        return
    if shard.member == DAMAGED:
        yield BadRecord(NO_END, shard.paths[0])
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
            yield BadRecord(f"unreadable: {type(e).__name__}", path)


def _read_file(path: str, shard: CorpusShard, data: DataConfig) -> Iterator[Document | BadRecord]:
    file_format = _format(path)
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
        kind = file_format.kind if file_format.kind != "unknown" else kind_of_content(stream.peek(512))
        if kind == "tar":
            yield from read_tar_stream(stream, path, data)
        else:
            yield from read_stream(stream, kind, path, data, shard.first_line, shard.document_bytes)


def _chunks(file: BinaryFile) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _format(path: str) -> Format | None:
    """The format of a listed file. Source code is listed for python-stdlib only."""
    return format_of(path.partition("?")[0] if is_url(path) else path, MEMBER_FORMATS)


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [str(p) for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    return [SourceFile(path, os.path.getsize(path), stamp_of(path)) for path in paths]


def _file_shard(files: list[SourceFile]) -> CorpusShard:
    stamp = " ".join(file.stamp for file in files)
    return CorpusShard(tuple(file.path for file in files), sum(file.size_bytes for file in files), stamp)


def _tar_shards(file: SourceFile) -> tuple[list[CorpusShard], list[BadRecord]]:
    """One shard per member, in the archive's order, and the notes on other members.

    A damaged archive gets one shard more, which is read as a bad record. Raises ConfigError if no member can hold text.
    """
    path, listing = file.path, list_tar(file.path)
    if listing.members and not any(is_readable_member(m.name) for m in listing.members):
        raise ConfigError(
            f"data.files: none of the {len(listing.members)} files in {path} has a known type, the first is "
            f"{listing.members[0].name}; a tar may hold {KNOWN}"
        )
    shards = [CorpusShard((path,), m.size_bytes, file.stamp, m.name, m.index, members=(m,)) for m in listing.members]
    if not shards or not listing.is_complete:
        shards.append(CorpusShard((path,), 0, file.stamp, DAMAGED))
    return shards, listing.notes


def _document_bytes(files: list[SourceFile], data: DataConfig) -> int:
    """The size of a document into which the text files of a small corpus are cut; 0 if the corpus is large enough as it is."""
    formats = [_format(file.path) for file in files]
    if data.document_separator is not None or not all(f and f.kind == "text" for f in formats):
        return 0
    n_documents = sum(-(-file.size_bytes // TEXT_DOCUMENT_BYTES) for file in files)
    if n_documents >= MIN_DOCUMENTS or len(files) >= ENOUGH_FILES:
        return 0
    return max(MIN_DOCUMENT_BYTES, sum(file.size_bytes for file in files) // MIN_DOCUMENTS)


def _joined(shards: list[CorpusShard]) -> CorpusShard:
    """One shard that reads some members of the same tar."""
    members = tuple(member for shard in shards for member in shard.members)
    notes = tuple(note for shard in shards for note in shard.notes)
    size_bytes = sum(shard.size_bytes for shard in shards)
    return CorpusShard(shards[0].paths, size_bytes, shards[0].stamp, members=members, notes=notes)


def _divided(shard: CorpusShard, data: DataConfig) -> list[CorpusShard]:
    """The parts of a shard of one large file or member of a tar; the shard itself if it cannot be divided, or need not be."""
    block_bytes = max(BLOCK_BYTES, shard.size_bytes // MAX_BLOCKS)
    path, member = shard.paths[0], shard.members[0] if shard.members else None
    if shard.size_bytes < 2 * block_bytes or len(shard.paths) > 1 or is_url(path) or (member and member.offset is None):
        return [shard]
    file_format = _format(member.name if member else path)
    try:
        if file_format == Format("parquet") and not member:
            return _row_group_shards(shard, block_bytes)
        if file_format in (Format("lines"), Format("text")) and not (member and reason_to_leave_out(member.name)):
            return _byte_range_shards(shard, block_bytes, data, is_text=file_format == Format("text"))
    except (OSError, UnreadableError, pyarrow.ArrowException):
        pass  # whoever reads the shard reports it
    return [shard]


def _byte_range_shards(shard: CorpusShard, block_bytes: int, data: DataConfig, is_text: bool) -> list[CorpusShard]:
    """Parts of a file or member of a tar that begin at the beginning of a document."""
    member = shard.members[0] if shard.members else None
    first = member.offset or 0 if member else 0
    with open(shard.paths[0], "rb") as file:
        content = buffered(byte_range(file, first, first + shard.size_bytes))
        if content.peek(4).startswith(tuple(mark for mark, _ in WIDE_MARKS)):
            return [shard]
        cuts = _text_cuts(content, block_bytes, shard, data) if is_text else _line_cuts(content, block_bytes)
        bounds = [(0, 1), *((at, line) for at, line in cuts if at < shard.size_bytes), (shard.size_bytes, 0)]
    parts = list[CorpusShard]()
    for (begin, line), (end, _) in pairwise(bounds):
        part = replace(shard, size_bytes=end - begin, first_line=line, notes=() if parts else shard.notes)
        if member:
            parts.append(replace(part, members=(replace(member, offset=first + begin, size_bytes=end - begin),)))
        else:
            parts.append(replace(part, byte_range=(begin, end)))
    return parts


def _line_cuts(file: BinaryFile, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Positions at about every `block_bytes` where a line begins, and the numbers of these lines."""
    position, line, next_cut = 0, 1, block_bytes
    while chunk := file.read(1 << 20):
        counted = 0
        while (newline := chunk.find(b"\n", max(next_cut - position, 0))) >= 0:
            line += chunk.count(b"\n", counted, newline + 1)
            counted = newline + 1
            yield position + counted, line
            next_cut = position + counted + block_bytes
        line += chunk.count(b"\n", counted)
        position += len(chunk)


def _text_cuts(file: io.BufferedReader, block_bytes: int, shard: CorpusShard, data: DataConfig) -> Iterator[tuple[int, int]]:
    """As `_line_cuts`, but only where a document begins."""
    position, line, next_cut = 0, 1, block_bytes
    for piece in text_pieces(file, shard.document_bytes or TEXT_DOCUMENT_BYTES, data.document_separator):
        position += len(piece)
        line += piece.count(b"\n")
        if position >= next_cut and piece.endswith(b"\n"):  # elsewhere, the next document may begin with a rest of this piece
            yield position, line
            next_cut = position + block_bytes


def _row_group_shards(shard: CorpusShard, block_bytes: int) -> list[CorpusShard]:
    """Parts of a parquet file: row groups that have about `block_bytes` uncompressed."""
    with pyarrow.parquet.ParquetFile(shard.paths[0]) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    total = sum(group.total_byte_size for group in groups) or 1
    parts: list[CorpusShard] = []
    first, first_row, row, done, n_bytes = 0, 1, 1, 0, 0
    for i, group in enumerate(groups):
        row += group.num_rows
        n_bytes += group.total_byte_size
        if n_bytes >= block_bytes or i == len(groups) - 1:
            size = shard.size_bytes * n_bytes // total if i < len(groups) - 1 else shard.size_bytes - done
            parts.append(replace(shard, row_groups=(first, i + 1), first_line=first_row, size_bytes=size, notes=()))
            first, first_row, done, n_bytes = i + 1, row, done + size, 0
    return [replace(parts[0], notes=shard.notes), *parts[1:]] if parts else [shard]
