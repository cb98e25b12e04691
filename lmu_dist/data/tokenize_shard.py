"""Tokenizing of one shard: a TokenizeTask in; part files of the corpus out, a token stream per split with counts of the text.

Runs in a process of this machine (data/task_runner) or on a node of the cluster (launch/corpus). data/merge joins the parts.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lmu_dist import storage
from lmu_dist.config import DataConfig, Folder
from lmu_dist.data.documents import BadRecord, CorpusShard, Document
from lmu_dist.data.encoder import load_encoder
from lmu_dist.data.manifest import TOKENIZER
from lmu_dist.data.sources import check_unchanged, read
from lmu_dist.data.splits import SPLITS, split_of_document

PART_FORMAT = 2  # version of the part files
FILES = ("problems", *(f"{split}.bin" for split in SPLITS))  # of a part; a JSON file has the counts
ENCODE_BYTES = 500_000  # text per call of the tokenizer
ROUND_TRIP_BYTES = 64_000  # text at the start of every shard that is decoded again, even if the tokenizer cannot lose any


@dataclass(frozen=True)
class TokenizeTask:
    """A corpus shard to tokenize, on this machine or another node of the cluster."""

    data: DataConfig
    shard: CorpusShard
    index: int  # of the shard, in the corpus
    folder: Folder  # of the corpus
    threads: int = 1
    shift: int = 0  # see splits.split_shift


def tokenize(task: TokenizeTask, count: Callable[[int], None] = lambda _: None) -> None:
    """Tokenizes one shard to its part files: a token stream per split, the list of bad records, and a JSON file of counts.

    The JSON file is written last, when the others are on disk; a part is complete when it exists. Calls `count` with the bytes
    of text of every batch. Raises FailedError if the shard's files have changed since they were listed, ConfigError if the
    tokenizer loses text.
    """
    check_unchanged(task.shard)
    folder, index = task.folder, task.index
    encoder = load_encoder(folder / TOKENIZER, task.data.tokenizer.end_of_text, task.threads)
    counts: dict[str, Any] = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
    counts |= {"separated": 0, "unseparated": 0}  # documents of text files, by whether a separator line ends them
    bad_records: Counter[str] = Counter()
    unchecked_bytes = ROUND_TRIP_BYTES
    with storage.staging_dir(folder / "parts") as local:
        with ExitStack() as files:
            listing = files.enter_context(open(local / "problems", "w", encoding="utf-8"))
            streams = {split: files.enter_context(open(local / f"{split}.bin", "wb")) for split in SPLITS}
            items = read(task.shard, task.data)
            while batch := _next_batch(items, listing, bad_records):
                batch_bytes = 0
                for document, ids in zip(batch, encoder.encode(batch, unchecked_bytes), strict=True):
                    split = split_of_document(document, task.data, task.shift)
                    # Not ndarray.tofile, whose error says nothing of a full disk.
                    streams[split].write(ids.data)
                    n_bytes = len(document.text.encode())
                    counts[split]["tokens"] += len(ids)
                    counts[split]["bytes"] += n_bytes
                    counts[split]["documents"] += 1
                    if document.separated is not None:
                        counts["separated" if document.separated else "unseparated"] += 1
                    batch_bytes += n_bytes
                unchecked_bytes -= batch_bytes
                count(batch_bytes)
            for file in (listing, *streams.values()):  # after a power failure, counts that exist must be those of these files
                file.flush()
                os.fsync(file.fileno())
        counts |= {"problems": bad_records, "sha256": {name: storage.digest(local / name) for name in FILES}}
        for name in FILES:
            storage.move_file(local / name, part_path(folder, index, name))
    content = json.dumps(counts)
    checked = {"counts": content, "sha256": hashlib.sha256(content.encode()).hexdigest()}
    storage.write_atomic(part_path(folder, index, "json"), json.dumps(checked).encode())


def read_counts(folder: Folder, index: int) -> dict[str, Any] | None:
    """The counts of a part: `tokens`, `bytes` and `documents` of each split, `problems` by reason, and `sha256` of each file.

    None if the part is incomplete, or its JSON file damaged.
    """
    try:
        stored = json.loads(part_path(folder, index, "json").read_bytes())
        intact = hashlib.sha256(stored["counts"].encode()).hexdigest() == stored["sha256"]
        return json.loads(stored["counts"]) if intact else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def part_path(folder: Folder, index: int, suffix: str) -> Folder:
    """Path of a part file of shard `index` of a corpus. `suffix`: "json" (the counts), "problems", or a split and ".bin"."""
    return folder / "parts" / f"{index:06d}.{suffix}"


def _next_batch(items: Iterator[Document | BadRecord], listing: Any, bad_records: Counter[str]) -> list[Document]:
    """The next documents, about ENCODE_BYTES of text. Bad records among them are counted and written to `listing`."""
    batch: list[Document] = []
    size = 0
    for item in items:
        if isinstance(item, BadRecord):
            bad_records[item.reason] += 1
            row = {"place": item.location, "problem": item.reason} | ({"detail": item.detail} if item.detail else {})
            listing.write(json.dumps(row, ensure_ascii=False) + "\n")
            continue
        batch.append(item)
        size += len(item.text)
        if size >= ENCODE_BYTES:
            break
    return batch
