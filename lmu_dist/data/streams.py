"""Byte streams: an open file in, its decompressed content in UTF-8, or a range of its bytes, out as a stream.

Called by data/sources and data/divide for files, by data/archives for members of tars, and by data/readers.
"""

import bz2
import codecs
import errno
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from backports import zstd

from lmu_dist.data.documents import BinaryFile, UnreadableError
from lmu_dist.data.formats import binary_format, kind_of_content

CHUNK_BYTES = 1 << 17
# The 4-byte marks come first, because the mark of UTF-32-LE begins with that of UTF-16-LE.
WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class ChunkStream(io.RawIOBase):
    """A readable stream of an iterator's chunks of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        """Always true: the stream can be read, not written."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads up to len(buffer) bytes and returns their number; 0 at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


def buffered(chunks: Iterator[bytes]) -> io.BufferedReader:
    """A buffered stream of chunks."""
    return io.BufferedReader(ChunkStream(chunks), CHUNK_BYTES)


def byte_range(file: BinaryFile, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`. Raises UnreadableError if the file ends before."""
    file.seek(begin)
    while begin < end:
        chunk = file.read(min(CHUNK_BYTES, end - begin))
        if not chunk:
            raise UnreadableError("unreadable: truncated")
        begin += len(chunk)
        yield chunk


def decompressed(file: BinaryFile, compression: str) -> io.BufferedReader:
    """The content of a compressed file: all gzip members, zstd frames, or bz2 or xz streams, one after the other.

    An empty file has empty content. Raises UnreadableError if the first bytes show that the file is something else; reading
    does where the file is truncated or damaged.
    """
    head = file.read(512)
    found = binary_format(head) or ("JSON" if kind_of_content(head) == "json" else None)
    if found not in (None, compression):
        raise UnreadableError(f"unreadable: its name says {compression}, but it is {found}; rename it")
    whole = buffered(_chain(head, file))
    return buffered(_gunzip(whole) if compression == "gzip" else _decompress(whole, compression))


def _chain(head: bytes, file: BinaryFile) -> Iterator[bytes]:
    yield head
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _gunzip(file: BinaryFile) -> Iterator[bytes]:
    with gzip.open(cast(Any, file)) as stream, reported(zlib.error, gzip.BadGzipFile):
        while chunk := stream.read1(CHUNK_BYTES):
            yield chunk


def _decompress(file: BinaryFile, compression: str) -> Iterator[bytes]:
    # The classes ZstdFile, BZ2File and LZMAFile raise EOFError for an empty file; the last two ignore what they cannot
    # decompress after the first stream; ZstdFile refuses long windows unless it is told otherwise.
    make: Callable[[], Any] = {
        "zstd": lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 31}),
        "bz2": bz2.BZ2Decompressor,
        "xz": lzma.LZMADecompressor,
    }[compression]
    block = file.read(CHUNK_BYTES)
    while block:
        decoder = make()
        while not decoder.eof:
            if decoder.needs_input and not block and not (block := file.read(CHUNK_BYTES)):
                raise UnreadableError("unreadable: truncated")
            with reported(zstd.ZstdError, OSError, lzma.LZMAError):
                chunk = decoder.decompress(block, CHUNK_BYTES)
            block = b""
            if chunk:
                yield chunk
        block = decoder.unused_data or file.read(CHUNK_BYTES)
        if compression == "xz":  # streams may be padded with zeros
            while block and not (block := block.lstrip(b"\0")):
                block = file.read(CHUNK_BYTES)


@contextmanager
def reported(*types: type[Exception]) -> Iterator[None]:
    """Turns the given exceptions of a block into an UnreadableError; the end of a file in the middle of data is "truncated"."""
    try:
        yield
    except EOFError as e:
        raise UnreadableError("unreadable: truncated") from e
    except types as e:
        raise UnreadableError(f"unreadable: damaged ({type(e).__name__})") from e


def is_full_disk(error: OSError) -> bool:
    """Whether the disk is full, or a quota used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def in_utf8(stream: io.BufferedReader) -> io.BufferedReader:
    """The stream in UTF-8, if a byte order mark at its start says that it is UTF-16 or UTF-32; else the stream itself."""
    head = stream.peek(4)[:4]
    encoding = next((encoding for mark, encoding in WIDE_MARKS if head.startswith(mark)), None)
    return stream if encoding is None else buffered(_transcode(stream, encoding))


def _transcode(stream: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    with reported(UnicodeError):
        while chunk := stream.read(CHUNK_BYTES):
            yield decoder.decode(chunk).encode()
        yield decoder.decode(b"", final=True).encode()
