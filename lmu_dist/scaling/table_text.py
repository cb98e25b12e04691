"""Tables in delimited text: a text in, named columns out. pandas reads the cells; what it has no option for is here.

Which character separates cells, and which line is the header, is found by the names of the columns that the caller needs.
Called by scaling/table_file.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from lmu_dist.config import ConfigError
from lmu_dist.scaling.numbers import parse_cell

SEPARATORS = (",", ";", "\t", "|", r"\s+")
SEPARATOR_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar", r"\s+": "a space"}
SNIFFED_LINES = 200  # the header is among the first lines
RULE = re.compile(r":?[-=+]{2,}:?|")  # cells of a line under a header, as Markdown has it


@dataclass(frozen=True)
class RawTable:
    """A table as it stands in a file: the names of its columns, and their cells, texts or values of the file's types.

    `surplus` has, by the index of a row, the cells beyond the last column.
    """

    names: tuple[str, ...]
    columns: tuple[list[Any], ...]
    surplus: dict[int, tuple[str, ...]] | None = None
    separator: str = ""
    notes: tuple[str, ...] = ()


def columns_from_text(text: str, name: str, wanted: Sequence[str]) -> RawTable:
    """Returns the columns of a delimited text. Raises ConfigError if it has no rows."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    separators = SEPARATORS
    if declared := re.fullmatch(r"\"?sep=(.)\"?[,;\s]*", lines[0]):  # Excel's first line
        separators, lines = (declared[1],), lines[1:]
    separator, comments = _separator(lines, separators, wanted)
    if all(i in comments or not line.strip() for i, line in enumerate(lines[1:], 1)):
        comments = set[int]()  # all rows begin with #, as names of runs may
    kept = [line for i, line in enumerate(lines) if i not in comments]
    has_header = any(set(wanted) <= set(_split(line, separator)) for line in kept[:SNIFFED_LINES])
    for i in () if has_header else sorted(comments):
        if set(wanted) <= set(header := _split(lines[i].strip().lstrip("# \t"), separator)) and header:
            kept.insert(sum(j not in comments for j in range(i)), lines[i].strip().lstrip("# \t"))
            break
    rows = _cells(kept, separator, name)
    rows = [row for row in rows if not all(map(RULE.fullmatch, row))]
    if not rows:
        raise ConfigError(f"{name} is empty")
    first = _header_index(rows, wanted)
    if first is None:  # numbers without names
        width = max(map(_width, rows))
        header, body = [str(i + 1) for i in range(width)], rows
    else:
        header, body = [_one_line(cell) for cell in rows[first][: _width(rows[first])]], rows[first + 1 :]
    if not body and set(wanted) <= set(header):
        raise ConfigError(f"{name} has a header but no rows")
    return _columns(header, body, separator, first or 0)


def _columns(header: list[str], body: list[list[str]], separator: str, n_titles: int) -> RawTable:
    if _has_row_names(header, body):
        header = ["", *header]
    if header and not header[0] and all(not row[0] for row in body):  # lines that begin with a bar
        header, body = header[1:], [row[1:] for row in body]
    width = len(header)
    surplus = {i: tuple(row[width : _width(row)]) for i, row in enumerate(body) if _width(row) > width}
    columns = tuple([row[i] if i < len(row) else "" for row in body] for i in range(width))
    notes = (f"skipped {n_titles} line{'s' * (n_titles > 1)} above the header",) if n_titles else ()
    return RawTable(tuple(header), columns, surplus, separator, notes)


def _separator(lines: Sequence[str], separators: Sequence[str], wanted: Sequence[str]) -> tuple[str, set[int]]:
    """Returns the separator, and the indices of comment lines.

    It is the one under which some line has all wanted names; else the one under which most lines have the same number of
    cells, at least two.
    """
    filled = [line for line in lines if line.strip()][:SNIFFED_LINES]
    best, most = separators[0], 0
    for separator in separators:
        for line in filled:
            names = _split(line.strip("\n "), separator)
            plain = _split(line.strip().lstrip("# \t"), separator)
            if wanted and (set(wanted) <= set(names) or set(wanted) <= set(plain)):
                return separator, _comments(lines, separator, wanted)
        widths = Counter(len(_split(line, separator)) for line in filled if not line.lstrip().startswith("#"))
        count = max((n for width, n in widths.items() if width > 1), default=0)
        if count > most * 1.2:  # spaces and commas in texts separate less regularly
            best, most = separator, count
    return best, _comments(lines, best, wanted)


def _comments(lines: Sequence[str], separator: str, wanted: Sequence[str]) -> set[int]:
    return {
        i
        for i, line in enumerate(lines)
        if line.lstrip().startswith("#") and not (wanted and set(wanted) <= set(_split(line, separator)))
    }


def _split(line: str, separator: str) -> list[str]:
    """The cells of one line, as far as a search for names needs them."""
    parts = line.split() if separator == r"\s+" else line.split(separator)
    return [part.strip().strip("\"'").strip() for part in parts]


def _cells(lines: Sequence[str], separator: str, name: str) -> list[list[str]]:
    import pandas as pd

    split = (lambda line: len(line.split())) if separator == r"\s+" else (lambda line: line.count(separator) + 1)
    options: dict[str, Any] = {
        "sep": separator,
        "header": None,
        "names": range(max(map(split, lines), default=1) or 1),
        "dtype": str,
        "keep_default_na": False,
        "na_filter": False,
        "index_col": False,
        "skipinitialspace": True,
    }
    text = "\n".join(lines)
    if not text.strip():
        return []
    try:
        try:
            frame = pd.read_csv(StringIO(text), **options)
        except pd.errors.ParserError:  # a quotation mark that is never closed: take it for a character
            frame = pd.read_csv(StringIO(text), **options, quoting=3)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as e:
        raise ConfigError(
            f"{name} is not a table of cells separated by {SEPARATOR_NAMES.get(separator, separator)}: {e}"
        ) from e
    rows = [[str(cell).strip() for cell in row] for row in frame.to_numpy().tolist()]
    return [row for row in rows if any(row)]


def _one_line(name: str) -> str:
    return " ".join(name.split())


def _width(row: Sequence[str]) -> int:
    """The number of cells up to the last one that is not empty."""
    return max((i + 1 for i, cell in enumerate(row) if cell), default=0)


def _header_index(rows: list[list[str]], wanted: Sequence[str]) -> int | None:
    """Returns which row is the header; None if there is none, and all rows are numbers."""
    for i, row in enumerate(rows[:SNIFFED_LINES]):
        if wanted and set(wanted) <= set(map(_one_line, row)):
            return i
    for i, row in enumerate(rows[:SNIFFED_LINES]):  # some of the names, as of a table of other columns
        if any(name in row for name in wanted) and not any(map(_is_number, row)):
            return i
    usual = Counter(map(_width, rows)).most_common(1)[0][0]
    first = next(i for i, row in enumerate(rows) if _width(row) >= min(usual, max(map(_width, rows))))
    return None if all(_is_number(cell) for cell in rows[first] if cell) else first


def _is_number(text: str) -> bool:
    return parse_cell(text).kind == "number"


def _has_row_names(header: Sequence[str], body: Sequence[Sequence[str]]) -> bool:
    """Whether all rows begin with a name or a number of the row that the header leaves out, as R and pandas print tables."""
    if len(body) < 2 or any(_width(row) != len(header) + 1 for row in body):
        return False
    names = [row[0] for row in body]
    counted = names in ([str(i) for i in range(len(names))], [str(i + 1) for i in range(len(names))])
    return counted or not any(map(_is_number, names))
