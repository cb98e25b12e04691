"""Readers of the texts inside packages: the bytes of member files in; the pages of a work out, as lists of paragraphs.

A reader takes the files of one source of packages.yaml, in the order of their paths, and yields `Page`s: the part of the file's
name (or of its content) that says which work a page belongs to, and its paragraphs. make_corpus.py calls READERS by the name
that the source gives, then drops what pages repeat and joins paragraphs to documents.
"""

import fnmatch
import gzip
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

# What is no running text: code, tables, lists of links. An element is skipped with all it holds.
SKIPPED_TAGS = {"script", "style", "pre", "table", "head", "nav", "header", "footer", "form", "button", "svg", "math", "select"}
SKIPPED_CLASSES = re.compile(
    r"\b(?:nav\w*|toc\w*|\w*sidebar\w*|related|menu|breadcrumbs?|footer|copyright|legalnotice|highlight\S*|headerlink|navigation)\b"
)
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
BLOCK_TAGS = HEADINGS | {"p", "div", "li", "dd", "dt", "blockquote", "section", "article", "hr", "ul", "ol", "dl", "body"}
SENTENCE_END = re.compile(r"[.!?:;][\"'\u201d\u2019)\]]*$|[)\]]$")
MIN_WORDS, MIN_LETTER_SHARE = 5, 0.75  # of a paragraph that counts as prose
LONG_WORDS = 30  # a paragraph of as many words need not end as a sentence does
MIN_ENTRY_WORDS = 5  # of an entry of a dictionary
# Entries of the GCIDE name their source after every sense, and write letters with accents as [=e], ['e] or [imac].
SOURCE_NOTE = re.compile(
    r"\s*\[(?:\d{4} Webster|Webster[^\]]{0,20}|WordNet[^\]]{0,12}|PJC|Century Dict[^\]]{0,12}|AS|RP|RH|MW\d*)\]"
)
MARK = r"(?:[^\w\s\]]{1,2}|mac|breve|uml|acute|grave|circ|cedil|til|slash)"
ACCENT = re.compile(rf"\[{MARK}([a-zA-Z]{{1,2}})\]|\[([a-zA-Z]{{1,2}}){MARK}\]")
PRONUNCIATION = re.compile(r"\s*\\[^\\]{1,80}\\")
# Roles and links of reStructuredText (:ref:`text <target>`), literals, emphasis.
INLINE_MARKUP = re.compile(r"(?::[\w:+-]+:)?`{1,2}([^`<]*?)(?: <[^>`]*>)?`{1,2}_{0,2}|\*{1,2}(\w[^*]*?)\*{1,2}")
WML_STRING = re.compile(r'_\s*"((?:[^"]|"")*)"')  # a string of the game that is translated, and so is shown to the player
Files = Iterable[tuple[str, bytes]]  # paths in the package, and contents
BASE64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


@dataclass(frozen=True)
class Page:
    """Paragraphs of a work, in order. `entry` is what an entry of a dictionary says, without its headword; else ""."""

    work: str
    paragraphs: list[str]
    entry: str = ""


@dataclass
class Decoder:
    """Decodes files line by line: a line that is not UTF-8 is read as Windows-1252, and counted."""

    lines_not_utf8: int = 0

    def text(self, raw: bytes) -> str:
        """The text of a file, with Unix line ends."""
        raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            return raw.decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            return "\n".join(self._line(line) for line in raw.split(b"\n"))

    def _line(self, line: bytes) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.lines_not_utf8 += 1
            return line.decode("cp1252", errors="replace")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph ends as a sentence does, has some words, and is mostly letters: no code, formula or list of names."""
    n_letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    n_words = len(paragraph.split())
    is_sentence = n_words >= LONG_WORDS or SENTENCE_END.search(paragraph) is not None
    return is_sentence and n_words >= MIN_WORDS and n_letters >= MIN_LETTER_SHARE * len(paragraph)


class _Paragraphs(HTMLParser):
    """Collects the text of a page by paragraphs. `blocks` has (is a heading, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[tuple[bool, str]] = []
        self._text: list[str] = []
        self._heading = False
        self._skipped = ""  # the tag of the element that is being skipped
        self._depth = 0  # how many elements of this tag are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._depth += tag == self._skipped
            return
        names = " ".join(value or "" for name, value in attrs if name in ("class", "role"))
        if tag in SKIPPED_TAGS or (tag in ("div", "p", "ul", "a") and names and SKIPPED_CLASSES.search(names)):
            self._skipped, self._depth = tag, 1
        if tag in BLOCK_TAGS or tag in SKIPPED_TAGS:
            self.end_block()
            self._heading = tag in HEADINGS
        elif tag == "br":
            self._text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            if self._depth == 0:
                self._skipped = ""
        elif tag in BLOCK_TAGS:
            self.end_block()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._text.append(data)

    def end_block(self) -> None:
        """Ends a paragraph."""
        if text := " ".join("".join(self._text).replace("¶", " ").split()):
            self.blocks.append((self._heading, text))
        self._text, self._heading = [], False


def read_html(files: Files, work: str, decoder: Decoder) -> Iterator[Page]:
    """A page per file: its prose, and the headings before it."""
    for path, raw in files:
        parser = _Paragraphs()
        parser.feed(decoder.text(raw))
        parser.close()
        parser.end_block()
        yield Page(_work_of(path, work), _with_headings(parser.blocks))


def _with_headings(blocks: list[tuple[bool, str]]) -> list[str]:
    """The paragraphs of prose, each after the headings that stand directly before it."""
    result, headings = list[str](), list[str]()
    for is_heading, text in blocks:
        if is_heading:
            headings = [*headings[-1:], text]
        elif is_prose(text):
            result += [*headings, text]
            headings = []
    return result


def read_rst(files: Files, work: str, decoder: Decoder) -> Iterator[Page]:
    """A page per file of reStructuredText or AsciiDoc: its prose without inline markup. Literal blocks seldom are prose."""
    for path, raw in files:
        paragraphs = list[str]()
        for part in re.split(r"\n\s*\n", decoder.text(raw)):
            if not part.lstrip().startswith((".. ", ":", "|", "+-", "==", "$ ", "# ", ">>>", "{")):
                text = " ".join(re.sub(r"^\s*(?:[-*+]|\d+\.|\(?\w\)) +", "", part).split())
                paragraphs.append(INLINE_MARKUP.sub(lambda m: m[1] or m[2] or "", text))
        yield Page(_work_of(path, work), [text for text in paragraphs if is_prose(text)])


def read_text(files: Files, work: str, decoder: Decoder) -> Iterator[Page]:
    """A page per file of plain text, whose paragraphs are separated by empty lines."""
    for path, raw in files:
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", decoder.text(raw)))
        yield Page(_work_of(path, work), [text for text in paragraphs if is_prose(text)])


def read_dictd(files: Files, work: str, decoder: Decoder) -> Iterator[Page]:
    """An entry per page, of the two files of a dictionary for dictd: an index of headwords, and the text (dictzip is gzip)."""
    contents = {Path(path).suffix: raw for path, raw in files}
    index, text = decoder.text(contents[".index"]), contents[".dz"]
    places = {tuple(map(_base64, line.split("\t")[1:3])) for line in index.splitlines() if not line.startswith("00-database")}
    for first, length in sorted(places):
        lines = decoder.text(text[first : first + length]).strip().split("\n")
        paragraphs = [_entry_text(part) for part in re.split(r"\n\s*\n|\n(?=\s+\d+[.:] )", "\n".join(lines))]
        paragraphs = [part for part in paragraphs if part]
        if sum(len(part.split()) for part in paragraphs) >= MIN_ENTRY_WORDS:
            yield Page(work, paragraphs, entry=" ".join(" ".join(lines[1:]).split()) or paragraphs[0])


def _entry_text(text: str) -> str:
    text = PRONUNCIATION.sub("", SOURCE_NOTE.sub("", " ".join(text.split())))
    return ACCENT.sub(lambda m: m[1] or m[2], text).replace("{", "").replace("}", "").strip()


def _base64(digits: str) -> int:
    """A number of a dictd index: base 64, the first digit the highest."""
    number = 0
    for digit in digits:
        number = number * 64 + BASE64[digit]
    return number


def read_wml(files: Files, work: str, decoder: Decoder) -> Iterator[Page]:
    """A page per scenario of a game of Wesnoth: its story and its dialogues, in the order in which the file has them."""
    for path, raw in files:
        strings = (m[1].replace('""', '"') for m in WML_STRING.finditer(decoder.text(raw)))
        paragraphs = (" ".join(re.sub(r"<[^>]+>", "", string).split()) for string in strings)
        yield Page(_work_of(path, work), [text for text in paragraphs if is_prose(text)])


def read_sword(files: Files, work: str, decoder: Decoder) -> Iterator[Page]:
    """A page per chapter of a Bible in SWORD's zText format, whose works are its books: blocks of zlib, and their index."""
    contents = {Path(path).name: raw for path, raw in files}
    for testament in ("ot", "nt"):
        blocks, index = contents[f"{testament}.bzz"], contents[f"{testament}.bzs"]
        for first, length, _ in struct.iter_unpack("<III", index):
            book = decoder.text(zlib.decompress(blocks[first : first + length]))
            book = re.sub(r"<(note|title)\b.*?</\1>", " ", book, flags=re.DOTALL)
            for chapter in re.split(r"(?=<chapter [^>]*osisID=)", book)[1:]:
                name = re.match(r'<chapter [^>]*osisID="(\w+)\.\w+"', chapter)
                parts = re.split(r'<(?:div|lg|l)\b[^>]*type="x-p"[^>]*>|<div [^>]*type="(?:x-)?p[^"]*"[^>]*>', chapter)
                paragraphs = [" ".join(re.sub(r"<[^>]*>", "", part).split()) for part in parts]
                if name:
                    yield Page(f"{work}{name[1]}", [text for text in paragraphs if len(text.split()) >= MIN_WORDS])


def read_rdata(files: Files, work: str, decoder: Decoder) -> Iterator[Page]:
    """A page per chapter of the character vectors in a lazy-load database of R: novels, a line or a chapter per element."""
    for path, raw in files:
        if path.endswith(".rdb"):
            for number, strings in enumerate(_character_vectors(raw)):
                text = "\n".join(decoder.text(string) for string in strings)
                for chapter in re.split(r"\n(?=CHAPTER |Chapter [IVXLC\d]+)", text):
                    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", chapter))
                    yield Page(f"{work}{number}", [part for part in paragraphs if len(part.split()) > 1])


def _character_vectors(database: bytes) -> Iterator[list[bytes]]:
    """The character vectors among the objects of an .rdb file: each is zlib after its length, and XDR (R-ints, 1.8)."""
    position = 0
    while position < len(database):
        stream = zlib.decompressobj()
        content = stream.decompress(database[position + 4 :]) + stream.flush()
        position = len(database) - len(stream.unused_data)
        version = struct.unpack(">i", content[2:6])[0]
        at = 14 + (4 + struct.unpack(">i", content[14:18])[0] if version == 3 else 0)
        flags, length = struct.unpack(">ii", content[at : at + 8])
        if content[:2] != b"X\n" or flags & 0xFF != 16:  # another type than a character vector
            continue
        at, strings = at + 8, list[bytes]()
        for _ in range(length):
            n_bytes = struct.unpack(">i", content[at + 4 : at + 8])[0]
            strings.append(content[at + 8 : at + 8 + max(0, n_bytes)])
            at += 8 + max(0, n_bytes)
        yield strings


def _work_of(path: str, work: str) -> str:
    """The name of a file's work: `work`, or if that is PREFIX:REGEX, PREFIX and what the first group matches in the path."""
    prefix, _, pattern = work.partition(":")
    match = re.search(pattern, path) if pattern else None
    return prefix + (match[1] if match else "other" if pattern else "")


def select(paths: list[str], wanted: list[str], unwanted: list[str]) -> list[str]:
    """The paths, sorted, that match a glob of `wanted` and none of `unwanted`. A `*` also stands for slashes."""
    keep = [path for path in paths if any(fnmatch.fnmatchcase(path, glob) for glob in wanted)]
    return sorted(path for path in keep if not any(fnmatch.fnmatchcase(path, glob) for glob in unwanted))


def content_of(path: Path) -> bytes:
    """The bytes of a file, decompressed if its name ends in .gz or .dz."""
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.suffix in (".gz", ".dz") else raw


READERS: dict[str, Callable[[Files, str, Decoder], Iterator[Page]]] = {
    "html": read_html,
    "text": read_text,
    "rst": read_rst,
    "dictd": read_dictd,
    "wml": read_wml,
    "sword": read_sword,
    "rdata": read_rdata,
}
