"""Corpora: a DataConfig in, units of work out, each a stream of documents and of problems, every one with its place.

A unit is what one process reads at a time: some small files, one large file, a member of an archive, a shard of a
Hugging Face data set. Units are listed in a fixed order and read independently of each other. Called by data/prepare.
"""

import glob
import gzip
import io
import json
import os
import platform
import sysconfig
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet
from backports import zstd

from lmu_dist.config import ConfigError, DataConfig, FailedError

FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar")
UNIT_BYTES = 4_000_000  # small files are read together up to this
TEXT_DOCUMENT_BYTES = 16_384  # a longer text file is cut into documents at the next line end
DAMAGED = "(damaged or empty archive)"  # in place of a member
MAX_LINE_BYTES = 64_000_000  # one JSON line; longer ones are a problem, not a reason to run out of memory


@dataclass(frozen=True)
class Document:
    """One text and where it stands."""

    text: str
    place: str


@dataclass(frozen=True)
class Problem:
    """Something that could not become a document: what, and where (file:line)."""

    kind: str
    place: str


@dataclass(frozen=True)
class Unit:
    """What one process reads: paths, or one member of a tar, or one shard of a Hugging Face data set.

    `size_bytes` is that on disk and drives the progress bar; `stamp` changes when the content may have.
    """

    paths: tuple[str, ...]
    size_bytes: int
    stamp: str
    member: str | None = None
    member_index: int = 0
    shard: tuple[int, int] | None = None  # number, of how many


def list_units(data: DataConfig) -> list[Unit]:
    """All units of a corpus in a fixed order. Raises ConfigError when there is nothing to read."""
    if data.source == "huggingface":
        n_shards = _load_dataset(data).num_shards
        return [Unit((str(data.dataset),), 1, "", shard=(i, n_shards)) for i in range(n_shards)]
    units: list[Unit] = []
    batch: list[str] = []
    batch_bytes = 0
    for path in _list_paths(data):
        size = os.path.getsize(path)
        if path.endswith(".tar"):
            units += _tar_units(path)
        elif size >= UNIT_BYTES:
            units.append(_unit([path]))
        else:
            batch.append(path)
            batch_bytes += size
            if batch_bytes >= UNIT_BYTES:
                units.append(_unit(batch))
                batch, batch_bytes = [], 0
    return units + ([_unit(batch)] if batch else [])


def read(unit: Unit, data: DataConfig) -> Iterator[Document | Problem]:
    """The documents of a unit in order, with what could not be read in its place."""
    if unit.shard is not None:
        yield from _read_dataset(unit, data)
        return
    for path in unit.paths:
        place = path if unit.member is None else f"{path}!{unit.member}"
        try:
            if unit.member == DAMAGED:
                yield Problem("unreadable: the archive has no end, or no members", path)
            elif unit.member is not None:
                with tarfile.open(path) as tar:
                    member = cast(io.BufferedReader, tar.extractfile(tar.getmembers()[unit.member_index]))
                    yield from _read_stream(member, unit.member, place, data.text_field)
            elif path.endswith(".parquet"):
                yield from _read_parquet(path, data.text_field)
            else:
                with open(path, "rb") as file:
                    yield from _read_stream(file, path, place, data.text_field)
        except (OSError, EOFError, zlib.error, zstd.ZstdError, tarfile.TarError, pyarrow.ArrowException) as e:
            yield Problem(f"unreadable: {type(e).__name__}", place)


def check_unchanged(unit: Unit) -> None:
    """Raises FailedError if the files of a unit are not, on this machine, what they were when they were listed."""
    if unit.shard is not None:
        return
    try:
        same = _unit(list(unit.paths)).stamp == unit.stamp
    except OSError:
        same = False
    if not same:
        raise FailedError(
            f"preparing failed: {unit.paths[0]} on {platform.node()} is not the file that was listed; put the corpus where all "
            "nodes see the same files, and leave it as it is meanwhile"
        )


def _list_paths(data: DataConfig) -> list[str]:
    if data.source == "python-stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return [str(p) for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    paths = sorted({os.path.abspath(p) for pattern in data.files for p in glob.glob(pattern, recursive=True)})
    paths = [p for p in paths if os.path.isfile(p)]
    if not paths:
        raise ConfigError(f"data.files: no file matches {', '.join(data.files)} (from {os.getcwd()}); give other globs")
    unknown = [p for p in paths if not p.endswith(FORMATS)]
    if unknown:
        raise ConfigError(f"data.files: {unknown[0]} is of no known kind; give globs of {' '.join(FORMATS)}")
    return paths


def _unit(paths: list[str]) -> Unit:
    stats = [os.stat(p) for p in paths]
    stamp = " ".join(f"{s.st_size}:{s.st_mtime_ns}" for s in stats)
    return Unit(tuple(paths), sum(s.st_size for s in stats), stamp)


def _tar_units(path: str) -> list[Unit]:
    """One unit per member, in the archive's order; a damaged archive has one more, whose reading reports it."""
    stamp = _unit([path]).stamp
    units, whole = [], False
    try:
        with tarfile.open(path) as tar:
            units = [Unit((path,), m.size, stamp, m.name, i) for i, m in enumerate(tar.getmembers()) if m.isfile()]
            with open(path, "rb") as file:
                # tarfile takes any unreadable header for the end; a real end is a block of zeros.
                file.seek(tar.offset)
                whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, EOFError, tarfile.TarError):
        pass
    return units if units and whole else [*units, Unit((path,), 0, stamp, DAMAGED)]


def _read_stream(file: io.BufferedIOBase, name: str, place: str, text_field: str) -> Iterator[Document | Problem]:
    if name.endswith(".jsonl.zst"):
        with zstd.open(file) as stream:
            yield from _read_jsonl(stream, place, text_field)
    elif name.endswith(".jsonl.gz"):
        with gzip.open(file) as stream:
            yield from _read_jsonl(stream, place, text_field)
    elif name.endswith(".jsonl"):
        yield from _read_jsonl(file, place, text_field)
    elif name.endswith((".txt", ".py")):
        yield from _read_text(file, place)
    else:
        yield Problem("unknown kind of file", place)


def _read_jsonl(lines: io.BufferedIOBase, place: str, text_field: str) -> Iterator[Document | Problem]:
    number = 0
    while line := lines.readline(MAX_LINE_BYTES):
        number += 1
        here = f"{place}:{number}"
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := lines.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield Problem("line too long", here)
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            yield Problem("not UTF-8", here)
        except (ValueError, RecursionError):
            yield Problem("broken JSON" if line.strip() else "empty line", here)
        else:
            yield _document(row.get(text_field) if isinstance(row, dict) else None, here)


def _read_text(file: io.BufferedIOBase, place: str) -> Iterator[Document | Problem]:
    """A text file is one document; a long one several, cut at line ends, or anywhere if there are none."""
    number, carried = 1, b""
    while chunk := file.read(TEXT_DOCUMENT_BYTES):
        chunk = carried + chunk + file.readline(TEXT_DOCUMENT_BYTES)
        whole = len(chunk) - _unfinished(chunk)
        chunk, carried = chunk[:whole], chunk[whole:]
        here = f"{place}:{number}"
        number += chunk.count(b"\n")
        try:
            yield _document(chunk.decode(), here)
        except UnicodeDecodeError:
            yield Problem("not UTF-8", here)
    if carried:
        yield Problem("not UTF-8", f"{place}:{number}")
    elif file.tell() == 0:
        yield Problem("empty document", place)


def _unfinished(chunk: bytes) -> int:
    """Bytes at the end that are the start of a character cut in two."""
    for n in range(1, min(4, len(chunk) + 1)):
        if chunk[-n] >= 0xC0:  # a first byte, of so many
            return n if n < (2 if chunk[-n] < 0xE0 else 3 if chunk[-n] < 0xF0 else 4) else 0
        if chunk[-n] < 0x80:
            return 0
    return 0


def _read_parquet(path: str, text_field: str) -> Iterator[Document | Problem]:
    with pyarrow.parquet.ParquetFile(path) as table:
        present = text_field in table.schema_arrow.names
        kind = table.schema_arrow.field(text_field).type if present else pyarrow.null()
        number = 0
        for batch in table.iter_batches(256, columns=[text_field] if present else []):
            column: list[Any] = [None] * batch.num_rows
            if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
                column = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            for text in column:
                number += 1
                yield _bytes_document(text, f"{path}:{number}")


def _read_dataset(unit: Unit, data: DataConfig) -> Iterator[Document | Problem]:
    assert unit.shard is not None
    index, n_shards = unit.shard
    try:
        for number, row in enumerate(_load_dataset(data).shard(n_shards, index), 1):
            yield _document(row.get(data.text_field), f"{data.dataset}/{index}:{number}")
    except OSError as e:  # the hub went away; no fault of the corpus, and to be tried again
        raise FailedError(f"reading shard {index} of {data.dataset} failed: {' '.join(str(e).split())[:200]}") from e


def _load_dataset(data: DataConfig) -> Any:
    """The streaming data set; ConfigError with the hub's reason when it is not to be had."""
    from datasets import load_dataset

    try:
        return load_dataset(str(data.dataset), data.dataset_config, split=data.dataset_split, streaming=True)
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ConfigError(f"data.dataset: cannot load {data.dataset!r} split {data.dataset_split!r}: {reason}") from e


def _bytes_document(text: bytes | None, place: str) -> Document | Problem:
    try:
        return _document(None if text is None else text.decode(), place)
    except UnicodeDecodeError:
        return Problem("not UTF-8", place)


def _document(text: Any, place: str) -> Document | Problem:
    if not isinstance(text, str):
        return Problem("no text field", place)
    if not text.strip():
        return Problem("empty document", place)
    try:
        text.encode()  # JSON can smuggle in half a surrogate pair
    except UnicodeEncodeError:
        return Problem("not UTF-8", place)
    return Document(text, place)
