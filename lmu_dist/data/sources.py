"""Corpus readers: a DataConfig in, corpus shards out, each an iterator of documents and bad records with their locations.

A corpus shard is what one process reads at a time: several small files, one large file, a member of a tar archive, or a shard
of a Hugging Face data set. Shards have a fixed order and are read independently of each other. Called by data/prepare.
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
SHARD_BYTES = 4_000_000  # small files are grouped into shards of about this size
TEXT_DOCUMENT_BYTES = 16_384  # a longer text file is cut into documents of about this size, at line ends
DAMAGED = "(damaged or empty archive)"  # stands for the member of a tar archive that cannot be read
MAX_LINE_BYTES = 64_000_000  # a longer JSON line is a bad record; reading it whole could exhaust memory


@dataclass(frozen=True)
class Document:
    """One text of the corpus and its location (file:line)."""

    text: str
    location: str


@dataclass(frozen=True)
class BadRecord:
    """A line, row or file that could not be read as a document: the reason and the location (file:line)."""

    reason: str
    location: str


@dataclass(frozen=True)
class CorpusShard:
    """A part of the corpus that one process reads: some files, one member of a tar, or one shard of a Hugging Face data set.

    `size_bytes` is the size on disk, for the progress bar. `stamp` (sizes and modification times) changes when the content may
    have changed. The field names are part of the corpus folder's digest, see manifest.corpus_folder.
    """

    paths: tuple[str, ...]
    size_bytes: int
    stamp: str
    member: str | None = None
    member_index: int = 0
    shard: tuple[int, int] | None = None  # Hugging Face: (index, number of shards)


def list_shards(data: DataConfig) -> list[CorpusShard]:
    """All shards of a corpus in a fixed order. Raises ConfigError if there is nothing to read."""
    if data.source == "huggingface":
        n_shards = _load_dataset(data).num_shards
        return [CorpusShard((str(data.dataset),), 1, "", shard=(i, n_shards)) for i in range(n_shards)]
    shards: list[CorpusShard] = []
    group: list[str] = []
    group_bytes = 0
    for path in _list_paths(data):
        size = os.path.getsize(path)
        if path.endswith(".tar"):
            shards += _tar_shards(path)
        elif size >= SHARD_BYTES:
            shards.append(_file_shard([path]))
        else:
            group.append(path)
            group_bytes += size
            if group_bytes >= SHARD_BYTES:
                shards.append(_file_shard(group))
                group, group_bytes = [], 0
    return shards + ([_file_shard(group)] if group else [])


def read(shard: CorpusShard, data: DataConfig) -> Iterator[Document | BadRecord]:
    """Yields the documents and bad records of a shard, in order."""
    if shard.shard is not None:
        yield from _read_dataset(shard, data)
        return
    for path in shard.paths:
        location = path if shard.member is None else f"{path}!{shard.member}"
        try:
            if shard.member == DAMAGED:
                yield BadRecord("unreadable: the archive has no end, or no members", path)
            elif shard.member is not None:
                with tarfile.open(path) as tar:
                    member = cast(io.BufferedReader, tar.extractfile(tar.getmembers()[shard.member_index]))
                    yield from _read_stream(member, shard.member, location, data.text_field)
            elif path.endswith(".parquet"):
                yield from _read_parquet(path, data.text_field)
            else:
                with open(path, "rb") as file:
                    yield from _read_stream(file, path, location, data.text_field)
        except (OSError, EOFError, zlib.error, zstd.ZstdError, tarfile.TarError, pyarrow.ArrowException) as e:
            yield BadRecord(f"unreadable: {type(e).__name__}", location)


def check_unchanged(shard: CorpusShard) -> None:
    """Raises FailedError if the shard's files, as this machine sees them, have changed since they were listed."""
    if shard.shard is not None:
        return
    try:
        same = _file_shard(list(shard.paths)).stamp == shard.stamp
    except OSError:
        same = False
    if not same:
        raise FailedError(
            f"preparing failed: {shard.paths[0]} on {platform.node()} differs from the file that was listed; put the corpus "
            "where all nodes see the same files, and do not change it while it is prepared"
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
        raise ConfigError(f"data.files: {unknown[0]} has an unknown file type; give globs that match {' '.join(FORMATS)} only")
    return paths


def _file_shard(paths: list[str]) -> CorpusShard:
    stats = [os.stat(p) for p in paths]
    stamp = " ".join(f"{s.st_size}:{s.st_mtime_ns}" for s in stats)
    return CorpusShard(tuple(paths), sum(s.st_size for s in stats), stamp)


def _tar_shards(path: str) -> list[CorpusShard]:
    """One shard per member, in the archive's order. A damaged archive gets one more, which is read as a bad record."""
    stamp = _file_shard([path]).stamp
    shards, complete = [], False
    try:
        with tarfile.open(path) as tar:
            shards = [CorpusShard((path,), m.size, stamp, m.name, i) for i, m in enumerate(tar.getmembers()) if m.isfile()]
            with open(path, "rb") as file:
                # tarfile takes any unreadable header for the end of the archive. A real end is a block of zeros.
                file.seek(tar.offset)
                complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, EOFError, tarfile.TarError):
        pass
    return shards if shards and complete else [*shards, CorpusShard((path,), 0, stamp, DAMAGED)]


def _read_stream(file: io.BufferedIOBase, name: str, location: str, text_field: str) -> Iterator[Document | BadRecord]:
    if name.endswith(".jsonl.zst"):
        with zstd.open(file) as stream:
            yield from _read_jsonl(stream, location, text_field)
    elif name.endswith(".jsonl.gz"):
        with gzip.open(file) as stream:
            yield from _read_jsonl(stream, location, text_field)
    elif name.endswith(".jsonl"):
        yield from _read_jsonl(file, location, text_field)
    elif name.endswith((".txt", ".py")):
        yield from _read_text(file, location)
    else:
        yield BadRecord("unknown kind of file", location)


def _read_jsonl(lines: io.BufferedIOBase, location: str, text_field: str) -> Iterator[Document | BadRecord]:
    number = 0
    while line := lines.readline(MAX_LINE_BYTES):
        number += 1
        here = f"{location}:{number}"
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := lines.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield BadRecord("line too long", here)
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            yield BadRecord("not UTF-8", here)
        except (ValueError, RecursionError):
            yield BadRecord("broken JSON" if line.strip() else "empty line", here)
        else:
            yield _document(row.get(text_field) if isinstance(row, dict) else None, here)


def _read_text(file: io.BufferedIOBase, location: str) -> Iterator[Document | BadRecord]:
    """Reads a text file as one document. A long file becomes several, cut at line ends, or anywhere if it has none."""
    number, rest = 1, b""
    while chunk := file.read(TEXT_DOCUMENT_BYTES):
        chunk = rest + chunk + file.readline(TEXT_DOCUMENT_BYTES)
        end = len(chunk) - _incomplete_bytes(chunk)
        chunk, rest = chunk[:end], chunk[end:]
        here = f"{location}:{number}"
        number += chunk.count(b"\n")
        try:
            yield _document(chunk.decode(), here)
        except UnicodeDecodeError:
            yield BadRecord("not UTF-8", here)
    if rest:
        yield BadRecord("not UTF-8", f"{location}:{number}")
    elif file.tell() == 0:
        yield BadRecord("empty document", location)


def _incomplete_bytes(chunk: bytes) -> int:
    """Number of bytes at the end of a chunk that begin a UTF-8 character without completing it."""
    for n in range(1, min(4, len(chunk) + 1)):
        if chunk[-n] >= 0xC0:  # the first byte of a character of 2, 3 or 4 bytes
            return n if n < (2 if chunk[-n] < 0xE0 else 3 if chunk[-n] < 0xF0 else 4) else 0
        if chunk[-n] < 0x80:
            return 0
    return 0


def _read_parquet(path: str, text_field: str) -> Iterator[Document | BadRecord]:
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


def _read_dataset(shard: CorpusShard, data: DataConfig) -> Iterator[Document | BadRecord]:
    assert shard.shard is not None
    index, n_shards = shard.shard
    try:
        for number, row in enumerate(_load_dataset(data).shard(n_shards, index), 1):
            yield _document(row.get(data.text_field), f"{data.dataset}/{index}:{number}")
    except OSError as e:  # the hub is unreachable: not a bad record, the command can be run again
        raise FailedError(f"reading shard {index} of {data.dataset} failed: {' '.join(str(e).split())[:200]}") from e


def _load_dataset(data: DataConfig) -> Any:
    """Opens the data set for streaming. Raises ConfigError with the hub's reason if that fails."""
    from datasets import load_dataset

    try:
        return load_dataset(str(data.dataset), data.dataset_config, split=data.dataset_split, streaming=True)
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ConfigError(f"data.dataset: cannot load {data.dataset!r} split {data.dataset_split!r}: {reason}") from e


def _bytes_document(text: bytes | None, location: str) -> Document | BadRecord:
    try:
        return _document(None if text is None else text.decode(), location)
    except UnicodeDecodeError:
        return BadRecord("not UTF-8", location)


def _document(text: Any, location: str) -> Document | BadRecord:
    if not isinstance(text, str):
        return BadRecord("no text field", location)
    if not text.strip():
        return BadRecord("empty document", location)
    try:
        text.encode()  # a JSON escape can hold half a surrogate pair, which is not valid UTF-8
    except UnicodeEncodeError:
        return BadRecord("not UTF-8", location)
    return Document(text, location)
