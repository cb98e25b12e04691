"""Readers of text, JSON and parquet: a binary stream in, documents and bad records with their line numbers out.

Called by data/sources and data/divide for files and by data/archives for members of tars.
"""

import codecs
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from lmu_dist.config import DataConfig
from lmu_dist.data.documents import (
    NO_FIELD,
    NOT_UTF8,
    NULS,
    BadRecord,
    BinaryFile,
    Document,
    UnreadableError,
    list_of_fields,
    make_document,
    make_record,
)
from lmu_dist.data.formats import Kind, binary_format, kind_of_content
from lmu_dist.data.streams import CHUNK_BYTES, buffered, in_utf8, reported

Record = Document | BadRecord
TEXT_DOCUMENT_BYTES = 16_384  # a longer text file is cut into documents of about this size, at line ends
MAX_LINE_BYTES = 64_000_000  # a longer JSON line or value is a bad record; reading it whole could exhaust memory
BOM = codecs.BOM_UTF8
_SEPARATOR = re.compile(rb"(?P<line>^|\n)?<\|(endoftext|end_of_text)\|>(?(line)\s*(\n|$))")


def read_stream(
    stream: io.BufferedReader, kind: Kind, location: str, data: DataConfig, first_line: int = 1, document_bytes: int = 0
) -> Iterator[Record]:
    """Yields the records of a decompressed stream of any kind but tar. `first_line` is the number of its first line.

    Raises UnreadableError if the rest of the stream cannot be read.
    """
    if kind != "parquet" and first_line == 1 and (found := binary_format(stream.peek(512))):
        raise UnreadableError(f"unreadable: its name does not say that it is {found}; rename it")
    if kind == "parquet":
        with tempfile.TemporaryFile() as file:  # a parquet file is read from its end
            shutil.copyfileobj(stream, file)
            yield from read_parquet(file, location, data.text_field)
    elif kind == "source":
        yield from _read_text(stream, location, first_line, None, TEXT_DOCUMENT_BYTES, is_source=True)
    elif kind == "text":
        stream = in_utf8(stream)
        yield from _read_text(stream, location, first_line, data.document_separator, document_bytes or TEXT_DOCUMENT_BYTES)
    else:
        stream = in_utf8(stream)
        if not stream.peek(1):
            yield BadRecord("empty file", location)
        read = _read_json if kind == "json" else _read_json_lines
        yield from read(stream, location, data.text_field, first_line)


def kind_of_stream(stream: io.BufferedReader, kind: Kind) -> tuple[Kind, io.BufferedReader]:
    """The kind of a decompressed stream, by its first bytes if its name does not say it, and the stream, in UTF-8 then."""
    if kind == "unknown" and (kind := kind_of_content(stream.peek(512))) != "tar":
        stream = in_utf8(stream)
        kind = kind_of_content(stream.peek(512))
    return kind, stream


def _read_json_lines(lines: io.BufferedReader, location: str, text_field: str, first_line: int = 1) -> Iterator[Record]:
    number = first_line - 1
    while line := lines.readline(MAX_LINE_BYTES):
        number += 1
        here = f"{location}:{number}"
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := lines.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield BadRecord("line too long", here)
            continue
        try:
            # Files with a byte order mark may have been concatenated, so any line can begin with one.
            row = json.loads(line.decode("utf-8-sig" if line.startswith(BOM) else "utf-8"))
        except UnicodeDecodeError:
            yield BadRecord(NOT_UTF8, here)
        except (ValueError, RecursionError):
            yield BadRecord(NULS if b"\0" in line else "broken JSON" if line.strip() else "empty line", here)
        else:
            yield make_record(row, text_field, here)


def _read_json(stream: io.BufferedReader, location: str, text_field: str, first_line: int = 1) -> Iterator[Record]:
    """Reads a .json file: an array of records, one record per line, or records that take several lines each."""
    head = [stream.readline(MAX_LINE_BYTES), stream.readline(MAX_LINE_BYTES)]
    whole = buffered(_chain(head, stream))
    if not head[0].removeprefix(BOM).lstrip().startswith(b"[") and any(_is_object(line) for line in head):
        yield from _read_json_lines(whole, location, text_field, first_line)
        return
    number = 0
    for number, row in enumerate(_json_values(whole), 1):
        yield make_record(row, text_field, f"{location}[{number}]")
    if not number and head[0]:
        yield BadRecord("empty file", location)


def _chain(head: list[bytes], stream: io.BufferedReader) -> Iterator[bytes]:
    yield from head
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _json_values(stream: io.BufferedReader) -> Iterator[Any]:
    """The records of JSON arrays, or JSON values one after the other, read in pieces.

    Raises UnreadableError where one is broken.
    """
    decoder, text_decoder = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    between = re.compile(r"[\s,\[\]\ufeff]*")
    text, position, depth, at_end, n_bytes = "", 0, 0, False, CHUNK_BYTES
    while True:
        skipped = between.match(text, position)
        assert skipped
        depth += skipped[0].count("[") - skipped[0].count("]")
        position = skipped.end()
        try:
            value, end = decoder.raw_decode(text, position)
            if end < len(text) or at_end:  # a number at the end of the buffer may go on
                yield value
                position = end
                continue
        except RecursionError:
            raise UnreadableError("unreadable: broken JSON") from None
        except ValueError:
            if at_end and position < len(text):
                reason = NULS if "\0" in text else "truncated or broken JSON"
                raise UnreadableError(f"unreadable: {reason}") from None
        if at_end:
            if depth > 0:
                raise UnreadableError("unreadable: truncated")
            return
        if len(text) - position > MAX_LINE_BYTES:
            raise UnreadableError("unreadable: broken JSON, or a record that is too long")
        n_bytes = max(CHUNK_BYTES, len(text) - position)  # doubles the buffer, so that long values cost linear time
        chunk = stream.read(n_bytes)
        at_end = not chunk
        with reported(UnicodeDecodeError):
            text, position = text[position:] + text_decoder.decode(chunk, final=at_end), 0


def text_pieces(stream: io.BufferedReader, document_bytes: int, separator: str | None) -> Iterator[bytes]:
    """The bytes of a text stream in pieces, a document each: up to a separator line (included), or of some `document_bytes`."""
    if separator is None:
        while chunk := stream.read(document_bytes):
            yield chunk + stream.readline(TEXT_DOCUMENT_BYTES)
        return
    mark, lines, n_bytes = separator.strip().encode(), list[bytes](), 0
    while line := stream.readline(MAX_LINE_BYTES):
        lines.append(line)
        n_bytes += len(line)
        if line.strip() == mark or n_bytes >= MAX_LINE_BYTES:
            yield b"".join(lines)
            lines, n_bytes = [], 0
    if lines:
        yield b"".join(lines)


def _read_text(
    stream: io.BufferedReader,
    location: str,
    first_line: int,
    separator: str | None,
    document_bytes: int,
    is_source: bool = False,
) -> Iterator[Record]:
    """Reads a text file as one document. A long file becomes several, cut at line ends, or anywhere if it has none.

    With a separator, a document is the text between two separator lines. Byte order marks at the start of a line are removed,
    and NULs refused, except in source code.
    """
    number, rest, n_pieces, at_line_start, noted = first_line, b"", 0, True, False
    for piece in text_pieces(stream, document_bytes, separator):
        n_pieces += 1
        chunk = rest + piece
        end = len(chunk) - _incomplete_bytes(chunk)
        chunk, rest = chunk[:end], chunk[end:]
        here = f"{location}:{number}"
        number += chunk.count(b"\n")
        separated = None
        if separator is not None:
            chunk, separated = _without_separator(chunk, separator.strip().encode())
            if not chunk and not separator.strip():  # one of several empty lines
                continue
        if not is_source and BOM in chunk:
            chunk = (chunk.removeprefix(BOM) if at_line_start else chunk).replace(b"\n" + BOM, b"\n")
        if separator is None and not is_source and not noted and b"<|end" in piece and (found := _SEPARATOR.search(piece)):
            noted = True
            inline = "<|endoftext|> inside lines; put it on lines of its own and"
            what = "lines <|endoftext|>;" if found["line"] is not None else inline
            yield BadRecord(f"kept as text: {what} set data.document_separator to split there", here)
        at_line_start = piece.endswith(b"\n")
        if b"\0" in chunk and not is_source:
            yield BadRecord(NULS, here)
            continue
        try:
            yield make_document(chunk.decode(), here, separated=separated)
        except UnicodeDecodeError:
            yield BadRecord(NOT_UTF8, here)
    if rest:
        yield BadRecord(NOT_UTF8, f"{location}:{number}")
    elif not n_pieces:
        yield BadRecord("empty document", location)


def _without_separator(piece: bytes, mark: bytes) -> tuple[bytes, bool]:
    """The document of a piece, without its separator line and line ends around it; and whether it has a separator line."""
    lines = piece.rstrip(b"\r\n") if mark else piece.removesuffix(b"\n")
    text, _, last = lines.rpartition(b"\n")
    separated = last.strip() == mark and (bool(mark) or piece.endswith(b"\n"))
    return (text if separated else piece).strip(b"\r\n"), separated


def _incomplete_bytes(chunk: bytes) -> int:
    """Number of bytes at the end of a chunk that begin a UTF-8 character without completing it."""
    for n in range(1, min(4, len(chunk) + 1)):
        if chunk[-n] >= 0xC0:  # the first byte of a character of 2, 3 or 4 bytes
            return n if n < (2 if chunk[-n] < 0xE0 else 3 if chunk[-n] < 0xF0 else 4) else 0
        if chunk[-n] < 0x80:
            return 0
    return 0


class _ParquetSource:
    """An open file for pyarrow. `error` is what reading the file itself raised, which says nothing of its content."""

    def __init__(self, file: BinaryFile) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        """Reads at most `size` bytes, all if it is negative."""
        try:
            return self._file.read(size)
        except Exception as e:
            self.error = e
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _damage_reported(source: _ParquetSource) -> Iterator[None]:
    """Turns pyarrow's errors into an UnreadableError. It raises a plain OSError for a damaged page, as a file system may."""
    try:
        yield
    except (pyarrow.ArrowException, OSError) as e:
        if source.error is not None:
            raise source.error from e
        raise UnreadableError(f"unreadable: damaged ({type(e).__name__})") from e


def read_parquet(
    file: BinaryFile, location: str, text_field: str, row_groups: tuple[int, int] | None = None, first_row: int = 1
) -> Iterator[Record]:
    """Yields the records of a parquet file, or of some of its row groups. Raises UnreadableError if it is damaged."""
    source = _ParquetSource(file)
    with _damage_reported(source), pyarrow.parquet.ParquetFile(source) as table:
        field = _parquet_field(table.schema_arrow, text_field)
        kind = f"{text_field} is {table.schema_arrow.field(text_field).type}" if text_field in table.schema_arrow.names else ""
        detail = kind or list_of_fields(table.schema_arrow.names)
        number = first_row - 1
        groups = list(range(*(row_groups or (0, table.num_row_groups))))
        if not table.metadata.num_rows:
            yield BadRecord("empty file", location)
        for batch in table.iter_batches(256, row_groups=groups, columns=[".".join(field)] if field else []):
            column: list[Any] = [None] * batch.num_rows
            if field:
                array = batch.column(0)
                array = cast(Any, pyarrow.compute).struct_field(array, field[1:]) if len(field) > 1 else array
                column = _to_bytes(array)
            for value in column:
                number += 1
                record = make_document(value, f"{location}:{number}")
                yield replace(record, detail=detail) if isinstance(record, BadRecord) and record.reason == NO_FIELD else record


def _parquet_field(schema: pyarrow.Schema, text_field: str) -> list[str] | None:
    """The path of the column that holds the text: one name, or several for a field inside structs; None if there is none."""
    if text_field in schema.names:
        return [text_field]
    names = text_field.split(".")
    if names[0] not in schema.names:
        return None
    kind = schema.field(names[0]).type
    for name in names[1:]:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return names


def _to_bytes(array: pyarrow.Array) -> list[Any]:
    """The values of a column as UTF-8 bytes, or lists of these; None where there is no text. Nothing is decoded here, since one
    value that is not UTF-8 would spoil the whole batch.
    """
    array = array.storage if isinstance(array, pyarrow.ExtensionArray) else array
    kind = _bytes_type(array.type)
    return [None] * len(array) if kind is None else array.cast(kind).to_pylist()


def _bytes_type(kind: pyarrow.DataType) -> pyarrow.DataType | None:
    """The type of bytes, or of lists of these, to which a column of text can be cast; None if it is no text."""

    def is_one_of(names: str) -> bool:
        return any(getattr(pyarrow.types, f"is_{name}")(kind) for name in names.split())

    if is_one_of("list large_list fixed_size_list list_view large_list_view"):
        value = _bytes_type(kind.value_type)
        return None if value is None else pyarrow.list_(value)
    if is_one_of("dictionary"):
        return _bytes_type(kind.value_type)
    texts = "string large_string string_view binary large_binary binary_view fixed_size_binary"
    return pyarrow.large_binary() if is_one_of(texts) else None
