"""Division of a corpus for the work: the shards that identify it in; shards of similar size with the same documents out.

Large files are divided at lines, documents or row groups; small members of a tar are joined. Called by data/prepare.
"""

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, pairwise

import pyarrow
import pyarrow.parquet

from lmu_dist.config import DataConfig
from lmu_dist.data.documents import BinaryFile, CorpusShard, UnreadableError
from lmu_dist.data.formats import Format, binary_format, reason_to_leave_out
from lmu_dist.data.paths import is_url
from lmu_dist.data.progress import Progress
from lmu_dist.data.readers import TEXT_DOCUMENT_BYTES, text_pieces
from lmu_dist.data.sources import SHARD_BYTES, listed_format
from lmu_dist.data.streams import WIDE_MARKS, buffered, byte_range

BLOCK_BYTES = 4_000_000  # a large file is divided into parts of about this size; a kill loses one per process
MAX_BLOCKS = 1000  # a very large file is divided into at most about as many parts


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


def _joined(shards: list[CorpusShard]) -> CorpusShard:
    """One shard that reads some members of the same tar."""
    members = tuple(member for shard in shards for member in shard.members)
    notes = tuple(note for shard in shards for note in shard.notes)
    size_bytes = sum(shard.size_bytes for shard in shards)
    first = shards[0]
    return CorpusShard(first.paths, size_bytes, first.stamp, members=members, split=first.split, notes=notes)


def _divided(shard: CorpusShard, data: DataConfig) -> list[CorpusShard]:
    """The parts of a shard of one large file or member of a tar; the shard itself if it cannot be divided, or need not be."""
    block_bytes = max(BLOCK_BYTES, shard.size_bytes // MAX_BLOCKS)
    path, member = shard.paths[0], shard.members[0] if shard.members else None
    if shard.size_bytes < 2 * block_bytes or len(shard.paths) > 1 or is_url(path) or (member and member.offset is None):
        return [shard]
    file_format = listed_format(member.name if member else path)
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
        if content.peek(4).startswith(tuple(mark for mark, _ in WIDE_MARKS)) or binary_format(content.peek(512)):
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
