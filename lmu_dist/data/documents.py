"""What corpus readers yield and what they read: documents, bad records, and the shards of a corpus.

Used by all readers (data/readers, data/archives, data/hub, data/sources) and by the steps of data/prepare.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lmu_dist.config import DataConfig

EMPTY = ("empty document", "empty line", "empty file")  # reasons that `data.empty: drop` allows
# How the reasons of records begin that are there for the user to know, and are not bad.
NOTES = ("left out", "kept as text")  # such as a README beside the data, or a line that could separate documents


@dataclass(frozen=True)
class Document:
    """One text of the corpus and its location (file:line).

    `split` is the split that the data set itself assigns; None: the split follows from the text.
    """

    text: str
    location: str
    split: str | None = None


@dataclass(frozen=True)
class BadRecord:
    """A line, row or file that is not read as a document, or a note on one: the reason and the location (file:line).

    A reason that begins with "unreadable" concerns a whole file, or the rest of one.
    """

    reason: str
    location: str


@runtime_checkable
class BinaryFile(Protocol):
    """A file that is open for reading bytes: a local file, a member of a tar, or a file of fsspec."""

    def read(self, size: int = -1, /) -> bytes:
        """Reads at most `size` bytes, all if it is negative."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Moves to a position and returns it."""
        ...


class UnreadableError(Exception):
    """The rest of a file cannot be read. The message is the reason of its bad record."""


@dataclass(frozen=True)
class TarMember:
    """A regular file in an uncompressed tar: its name, its index among all members, and where its content is, in bytes.

    `offset` is None for a sparse file, whose content is not in one piece.
    """

    name: str
    index: int
    offset: int | None
    size_bytes: int


@dataclass(frozen=True)
class CorpusShard:
    """A part of the corpus that one process reads: files, a part of one file, members of a tar, or a shard of a data set.

    `size_bytes` is the size on disk, for the progress bar. `stamp` (sizes and modification times) changes when the content may
    have changed.
    """

    paths: tuple[str, ...]
    size_bytes: int
    stamp: str
    member: str | None = None
    member_index: int = 0
    shard: tuple[int, int] | None = None  # Hugging Face: (index, number of shards)
    members: tuple[TarMember, ...] = ()  # the members of the tar to read
    byte_range: tuple[int, int] | None = None  # the part of a text or JSON Lines file: from, to
    row_groups: tuple[int, int] | None = None  # the part of a parquet file: first row group, end
    first_line: int = 1  # number of the first line or row of the part
    document_bytes: int = 0  # a text file is cut into documents of about this size; 0: TEXT_DOCUMENT_BYTES
    split: str | None = None  # Hugging Face: the split that all documents belong to; None: it follows from their texts
    notes: tuple[BadRecord, ...] = ()  # what was left out when the corpus was listed

    def identity(self) -> dict[str, Any]:
        """The fields that are part of the corpus folder's digest. They may not be renamed, see manifest.corpus_folder."""
        names = ("paths", "size_bytes", "stamp", "member", "member_index", "shard")
        return {name: getattr(self, name) for name in names}


def counts_as_bad(reason: str, data: DataConfig) -> bool:
    """Whether records with this reason count against `data.max_bad_share`; notes, and what is left out on purpose, do not."""
    return not (reason.startswith(NOTES) or (data.empty == "drop" and reason in EMPTY))


def make_document(value: Any, location: str, split: str | None = None) -> Document | BadRecord:
    """A document of a field's value: text, UTF-8 bytes, or a list of these, which is joined by newlines."""
    if not isinstance(value, str):
        try:
            value = _joined_text(value)
        except UnicodeDecodeError:
            return BadRecord("not UTF-8", location)
        if value is None:
            return BadRecord("no text field", location)
    if not value.strip():
        return BadRecord("empty document", location)
    if "\0" in value and value.count("\0") * 8 > len(value):
        return BadRecord("NUL characters: UTF-16 or binary data", location)
    try:
        value.encode()  # a JSON escape can hold half a surrogate pair, which is not valid UTF-8
    except UnicodeEncodeError:
        return BadRecord("not UTF-8", location)
    return Document(value, location, split)


def _joined_text(value: Any) -> str | None:
    """The text of UTF-8 bytes, or of a list of texts; None if the value is something else. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list) and all(isinstance(item, str | bytes) for item in value):
        return "\n".join(item if isinstance(item, str) else item.decode() for item in value)
    return None


def find_field(row: Any, field: str) -> Any:
    """The value of a field of a row, or None. A field that is literally named "meta.text" wins over `text` inside `meta`."""
    if isinstance(row, dict) and field in row:
        return row[field]
    for name in field.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row
