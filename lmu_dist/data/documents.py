"""What corpus readers yield and what they read: documents, bad records, and the shards of a corpus.

Used by all readers (data/readers, data/archives, data/hub, data/sources) and by the steps of data/prepare.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from lmu_dist.config import DataConfig

MAX_FIELDS = 8  # names of fields that a message lists
EMPTY = ("empty document", "empty line", "empty file")  # reasons that `data.empty: drop` allows
NO_FIELD, NOT_UTF8, NULS = "no text field", "not UTF-8", "NUL characters: UTF-16 or binary data"
# How the reasons of records begin that are there for the user to know, and are not bad.
NOTES = ("left out", "kept as text")  # such as a README among the data files, or a line that could separate documents


@dataclass(frozen=True)
class Document:
    """One text of the corpus and its location (file:line).

    `split` is the split that the data set or `data.validation_files` assigns; None: the split follows from the text.
    `separated` says whether a line `data.document_separator` ended the document; None: it is not of a text file, or there is no
    such key.
    """

    text: str
    location: str
    split: str | None = None
    separated: bool | None = None


@dataclass(frozen=True)
class BadRecord:
    """A line, row or file that is not read as a document, or a note on one: the reason and the location (file:line).

    A reason that begins with "unreadable" concerns a whole file, or the rest of one. Records are counted by their reasons;
    `detail` is what only this one has.
    """

    reason: str
    location: str
    detail: str = field(default="", compare=False)


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
    split: str | None = None  # of all documents, as the configuration says; None: it follows from their texts
    notes: tuple[BadRecord, ...] = ()  # what was left out when the corpus was listed

    def identity(self) -> dict[str, Any]:
        """The fields that are part of the corpus folder's digest. They may not be renamed, see manifest.corpus_folder."""
        names = ("paths", "size_bytes", "stamp", "member", "member_index", "shard")
        return {name: getattr(self, name) for name in names}


def counts_as_bad(reason: str, data: DataConfig) -> bool:
    """Whether records with this reason count against `data.max_bad_share`; notes, and what is left out on purpose, do not."""
    return not (reason.startswith(NOTES) or (data.empty == "drop" and reason in EMPTY))


def make_record(row: Any, field: str, location: str, split: str | None = None) -> Document | BadRecord:
    """The document of a row, whose text is in a field, or is the row itself; see `make_document`."""
    record = make_document(row if isinstance(row, str) else find_field(row, field), location, split)
    if isinstance(record, BadRecord) and record.reason == NO_FIELD:
        return replace(record, detail=_description(row, field))
    return record


def list_of_fields(names: Iterable[str]) -> str:
    """What a row has instead of the field that is missed, for a message."""
    names = list(names)
    return f"it has: {', '.join(names[:MAX_FIELDS])}{', ...' if len(names) > MAX_FIELDS else ''}"[:200]


def make_document(value: Any, location: str, split: str | None = None, separated: bool | None = None) -> Document | BadRecord:
    """A document of a field's value: text, UTF-8 bytes, or a list of these, which is joined by newlines."""
    if not isinstance(value, str):
        try:
            value = _joined_text(value)
        except UnicodeDecodeError:
            return BadRecord(NOT_UTF8, location)
        if value is None:
            return BadRecord(NO_FIELD, location)
    if not value.strip():
        return BadRecord("empty document", location)
    if "\0" in value and value.count("\0") * 8 > len(value):
        return BadRecord(NULS, location)
    try:
        value.encode()  # a JSON escape can hold half a surrogate pair, which is not valid UTF-8
    except UnicodeEncodeError:
        return BadRecord(NOT_UTF8, location)
    return Document(value, location, split, separated)


def _joined_text(value: Any) -> str | None:
    """The text of UTF-8 bytes, or of a list of texts, nested or with nulls among them; None if the value is something else.

    Raises UnicodeDecodeError.
    """
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = [_joined_text(item) for item in value if item is not None]
    return None if None in texts else "\n".join(text for text in texts if text is not None)


def _description(row: Any, field: str) -> str:
    """What a row without a text field has, for a message."""
    if not isinstance(row, dict):
        return f"it is {_kind(row)}"
    value = find_field(row, field)
    return list_of_fields(row) if value is None else f"{field} is {_kind(value)}"


def _kind(value: Any) -> str:
    """The kind of a JSON value that is no text."""
    if isinstance(value, list):
        return f"a list with {_kind(value[0])} first" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object ({list_of_fields(value)})"
    return "a text" if isinstance(value, str | bytes) else "null" if value is None else "a number or the like"


def find_field(row: Any, field: str) -> Any:
    """The value of a field of a row, or None. A field that is literally named "meta.text" wins over `text` inside `meta`."""
    if isinstance(row, dict) and field in row:
        return row[field]
    for name in field.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row
