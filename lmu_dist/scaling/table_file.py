"""Opens a table in any format that people have: a path in, named columns of cells out. Called by scaling/read_table.

Formats are recognised by content, not by name: delimited text, JSON, JSON lines, Parquet and Feather, each also compressed,
from a file or from standard input. Delimited text is in scaling/table_text, JSON in scaling/table_json.
"""

import difflib
import io
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmu_dist.config import ConfigError
from lmu_dist.scaling.table_json import columns_from_json
from lmu_dist.scaling.table_text import RawTable, columns_from_text

STDIN = Path("-")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # in no text
EXCEL_WORKBOOK = ("xl/workbook.xml", "xl/workbook.bin", "content.xml")  # members of .xlsx, .xlsb and .ods


def name_of(path: Path) -> str:
    """Returns what messages call a table."""
    return "the table on standard input" if path == STDIN else str(path)


def read_raw_table(path: Path, wanted: Sequence[str]) -> RawTable:
    """Returns the columns of a file, or of standard input for `-`. Raises ConfigError if it holds no table.

    `wanted` has the names of columns that the caller needs; the header of a text is found by them.
    """
    name = name_of(path)
    content = _uncompressed(_content(path), name)
    if not content.strip():
        raise ConfigError(f"{name} is empty")
    if content[:4] == b"PAR1" or content[:6] in (b"ARROW1", b"FEA1"):
        return _columns_from_arrow(content, name)
    text = _text(content, name)
    if text.lstrip()[:1] in ("{", "["):
        return columns_from_json(text, name, wanted)
    return columns_from_text(text, name, wanted)


def _content(path: Path) -> bytes:
    if path == STDIN:
        return sys.stdin.buffer.read()
    try:
        return path.expanduser().read_bytes()
    except FileNotFoundError as e:
        folder = path.expanduser().parent
        others = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        similar = difflib.get_close_matches(path.name, others, 1)
        hint = f"; did you mean {path.parent / similar[0]}?" if similar else "" if folder.is_dir() else f": no folder {folder}"
        raise ConfigError(f"the file {path} does not exist{hint}") from e
    except IsADirectoryError as e:
        raise ConfigError(f"{path} is not a CSV text file but a folder; give a file with a table") from e
    except (PermissionError, NotADirectoryError) as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e


def _uncompressed(content: bytes, name: str) -> bytes:
    from lmu_dist.data.documents import UnreadableError
    from lmu_dist.data.formats import COMPRESSIONS, binary_format
    from lmu_dist.data.streams import decompressed

    kind = binary_format(content[:512])
    if kind is not None and kind in COMPRESSIONS.values():
        try:
            return _uncompressed(decompressed(io.BytesIO(content), kind).read(), name)
        except UnreadableError as e:
            raise ConfigError(f"{name}, compressed with {kind}, is {e}") from e
    if kind == "a zip archive":
        return _unzipped(content, name)
    if kind == "a tar":
        raise ConfigError(f"{name} is a tar archive; unpack it and give one table")
    return content


def _unzipped(content: bytes, name: str) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [m for m in archive.namelist() if not m.endswith("/") and not m.startswith("__MACOSX/")]
            if set(members) & set(EXCEL_WORKBOOK):
                raise ConfigError(f"{name} is a spreadsheet; save it as CSV (File, Save as) and give that file")
            if len(members) != 1:
                raise ConfigError(f"{name} is an archive of {len(members)} files; unpack it and give one table")
            return _uncompressed(archive.read(members[0]), name)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as e:  # the last two: encrypted, an unknown method
        raise ConfigError(f"{name} is a zip archive that cannot be read: {e}") from e


def _text(content: bytes, name: str) -> str:
    """Returns the text of a file: UTF-8, UTF-16 or -32, or else Windows' western encoding, which any text without NULs is."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encodings = ["utf-32" if content[:4] == b"\xff\xfe\0\0" else "utf-16"]
    elif b"\0" in content[:200]:  # UTF-16 without a mark: every other byte of plain letters is 0
        encodings = ["utf-16-be" if content[:1] == b"\0" else "utf-16-le"]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not _CONTROL.search(text) and (encoding[:6] != "utf-16" or _is_western(text)):
            return text
    raise ConfigError(f"{name} is not a CSV text file, nor JSON or Parquet; save the table as one of these (as text, in UTF-8)")


def _is_western(text: str) -> bool:
    """Whether most characters are of western languages: bytes that are no text can be decoded as UTF-16, but to rare ones."""
    return sum(c < "\u0250" for c in text) > 0.8 * len(text)


def _columns_from_arrow(content: bytes, name: str) -> RawTable:
    import pyarrow as pa
    import pyarrow.feather as feather
    import pyarrow.parquet as parquet

    reader: Any = parquet if content[:4] == b"PAR1" else feather
    try:
        table = reader.read_table(pa.BufferReader(content))
        while any(pa.types.is_struct(field.type) for field in table.schema):
            table = table.flatten()  # nested columns get names such as metrics.loss
        columns = [column.to_pylist() for column in table.columns]
    except (pa.ArrowException, OSError, ValueError) as e:
        raise ConfigError(f"{name} is a Parquet or Feather file that cannot be read: {str(e).splitlines()[0]}") from e
    return RawTable(tuple(table.schema.names), tuple(columns))
