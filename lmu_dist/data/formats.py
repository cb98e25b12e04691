"""File formats of a corpus: the name of a file in, what it holds and how it is compressed out.

FORMATS and COMPRESSIONS are the only tables of suffixes. Called by data/paths, data/streams, data/readers, data/archives,
data/sources and data/divide.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "source", "lines", "json", "parquet", "tar", "unknown"]
FORMATS: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".tar": "tar",
}
MEMBER_FORMATS: dict[str, Kind] = {**FORMATS, ".py": "source"}  # of members of a tar, and of Python's standard library
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
SHORT_SUFFIXES = {
    ".tgz": ".tar.gz",
    ".tzst": ".tar.zst",
    ".txz": ".tar.xz",
    ".tbz2": ".tar.bz2",
    ".tbz": ".tar.bz2",
    ".zstd": ".zst",
    ".jsonlines": ".jsonl",
}
NO_TEXT = (".csv", ".tsv", ".html", ".xml", ".warc", ".wet", ".wat", ".sql", ".pdf", ".arrow", ".npy", ".zip", ".parquet")
KNOWN = f"{' '.join(FORMATS)}, all but .parquet also with {' '.join(COMPRESSIONS)}"

# Files that lie among data files, in a folder, an archive or the matches of a glob. They are left out by their whole name:
# license.jsonl and lorem_ipsum.txt are data.
DOCUMENTATION = re.compile(r"(readme|licen[cs]e|copying|changelog)([-_.][a-z]{2,8})?\.txt", re.IGNORECASE)
DOCUMENTATION_WITHOUT_FORMAT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|changes|citation|authors|contribut(ing|ors)|datasheet)([-_. ].*)?|"
    r".*\.(md|markdown|rst|bib|cff)",
    re.IGNORECASE,
)
CHECKSUMS = re.compile(
    r".*\.(md5|sha1|sha224|sha256|sha384|sha512|crc|crc32|sfv|asc|sig)|(md5|sha\d*|b2)?[-_]?(check)?sums?(\.txt)?",
    re.IGNORECASE,
)
METADATA = re.compile(
    r"(data|dataset)?[-_]?(meta|metadata|infos?|dict|manifest|index|stats|statistics|state|schema|config)\.json|"
    r".*[-_.](meta|metadata|croissant)\.json|(package|datapackage|croissant|checksums|vocab|tokenizer|tokenizer_config|"
    r"special_tokens_map)\.json|_success|thumbs\.db|desktop\.ini|\.gitattributes|\.gitignore|\.ds_store",
    re.IGNORECASE,
)


MAGIC = {  # how files begin that are no text
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    "a zip archive": re.compile(rb"PK\x03\x04"),
    "parquet": re.compile(rb"PAR1\x15"),
    "a tar": re.compile(rb".{257}ustar[\0 ]", re.DOTALL),
}


@dataclass(frozen=True)
class Format:
    """What a file holds, and how it is compressed (a value of COMPRESSIONS; "" for not at all).

    A compressed file whose name does not say what it holds, such as a.zst, is of kind "unknown": its first bytes say it.
    """

    kind: Kind
    compression: str = ""


def format_of(name: str, formats: Mapping[str, Kind] = FORMATS) -> Format | None:
    """The format that a file's name says, in letters of either case; None if it is not known."""
    name = name.lower()
    for short, long in SHORT_SUFFIXES.items():
        name = name.removesuffix(short) + long if name.endswith(short) else name
    compression = next((s for s in COMPRESSIONS if name.endswith(s)), "")
    stem = name.removesuffix(compression)
    kind: Kind | None = next((k for suffix, k in formats.items() if stem.endswith(suffix)), None)
    if not compression:
        return Format(kind) if kind else None
    if kind == "parquet" or (kind is None and stem.endswith(NO_TEXT)):
        return None
    return Format(kind or "unknown", COMPRESSIONS[compression])


def reason_to_leave_out(name: str) -> str | None:
    """Why a file among the data files is not read, from its name only; None if it may be data."""
    base = name.rstrip("/").rpartition("/")[2]
    if base.startswith("._") or "__MACOSX/" in name:
        return "left out: AppleDouble (metadata of macOS)"
    without_format = format_of(base, MEMBER_FORMATS) is None
    if DOCUMENTATION.fullmatch(base) or (without_format and DOCUMENTATION_WITHOUT_FORMAT.fullmatch(base)):
        return "left out: documentation"
    if CHECKSUMS.fullmatch(base):
        return "left out: checksums"
    return "left out: metadata" if METADATA.fullmatch(base) else None


def binary_format(head: bytes) -> str | None:
    """The compression (a value of COMPRESSIONS), "a tar" or the like, that the first bytes of a file show; None for others."""
    return next((name for name, magic in MAGIC.items() if magic.match(head)), None)


def kind_of_content(head: bytes) -> Kind:
    """The kind of a file whose name does not say it, by its first bytes: a tar, JSON, or else text."""
    if head[257:262] == b"ustar":
        return "tar"
    return "json" if re.match(rb"(\xef\xbb\xbf)?\s*(\{\s*[\"}]|\[\s*[{\"])", head) else "text"
