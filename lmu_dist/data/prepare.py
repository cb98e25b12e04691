"""Corpus preparation: a DataConfig in; one memory-mapped token stream per split, tokenizer.json and manifest.json out.

It can be killed and restarted at any point; the result is the same byte for byte. Each corpus shard is tokenized to part files
of its own, on any machine. Parts are concatenated in a fixed order. All files are written atomically.
"""

import functools
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from lmu_dist import storage
from lmu_dist.config import ConfigError, DataConfig, FailedError, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.corpus import Corpus, open_corpus
from lmu_dist.data.manifest import FORMAT, MANIFEST, PROBLEMS, TOKENIZER, Manifest, corpus_folder
from lmu_dist.data.sources import BadRecord, CorpusShard, Document, check_unchanged, list_shards, read

SPLITS = {"train": range(96), "validation": range(96, 99), "test": range(99, 100)}
SPLIT_RULE = "sha256 of the document's UTF-8, first 8 bytes as a number, modulo 100: 0-95 train, 96-98 validation, 99 test"
TOKENIZER_TRAINING_BYTES = 64_000_000  # text that a BPE tokenizer is trained on, taken evenly from all shards
ENCODE_BYTES = 1_000_000  # text per call of the tokenizer
Progress = Callable[..., None]  # called with: activity, amount done (here in bytes), total amount, optional text


@dataclass(frozen=True)
class TokenizeTask:
    """A corpus shard to tokenize, on this machine or another node of the cluster."""

    data: DataConfig
    shard: CorpusShard
    index: int  # of the shard, in the corpus
    folder: Folder  # of the corpus
    threads: int = 1


TaskRunner = Callable[
    [Sequence[TokenizeTask]], Iterator[TokenizeTask]
]  # runs `tokenize` on every task, in any order, and yields each task when it is done


def run_in_processes(tasks: Sequence[TokenizeTask]) -> Iterator[TokenizeTask]:
    """Runs the tasks in a pool of processes on the CPUs of this machine."""
    cpus = len(os.sched_getaffinity(0))
    n_processes = min(cpus, len(tasks))
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn")) as pool:
        threads = max(1, cpus // n_processes)
        futures = {pool.submit(tokenize, replace(task, threads=threads)): task for task in tasks}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as e:
            raise FailedError("preparing failed: a tokenizing process was killed, perhaps because memory ran out") from e
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prepare(
    data: DataConfig,
    storage_folder: Folder,
    progress: Progress = lambda *_: None,
    run_tasks: TaskRunner = run_in_processes,
) -> Corpus:
    """Prepares a corpus below `storage_folder` and opens it. If it is already prepared, only opens it.

    Raises ConfigError if too much of the corpus cannot be read, or if another process is preparing it.
    """
    shards = list_shards(data)
    folder = corpus_folder(data, storage_folder, shards)
    if (folder / MANIFEST).exists() and not (folder / "parts").exists():
        return open_corpus(folder)
    state_dir = storage.local_state_dir(folder)
    storage.make_folder(state_dir)
    try:
        with FileLock(state_dir / "lock", timeout=0):
            if not (folder / MANIFEST).exists():
                _ensure_tokenizer(data, shards, folder, progress)
                counts = _tokenize_missing(data, shards, folder, progress, run_tasks)
                _check_bad_records(data, shards, counts, folder)
                _merge_parts(data, len(shards), counts, folder)
            storage.remove(folder / "parts")
    except FileNotFoundError:
        # For a URI the lock holds on this machine only: another machine may have finished the corpus and deleted the parts.
        if not (folder / MANIFEST).exists():
            raise
    except Timeout as e:
        raise ConfigError(f"{folder} is being prepared by another process; wait until it has finished, then start again") from e
    return open_corpus(folder)


def split_of(text: str) -> str:
    """The split of a document, which depends on its content only (SPLIT_RULE)."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def _ensure_tokenizer(data: DataConfig, shards: list[CorpusShard], folder: Folder, progress: Progress) -> None:
    """Writes tokenizer.json unless it exists. A BPE tokenizer is trained on training documents from all shards."""
    path = folder / TOKENIZER
    if path.exists():
        return
    budget = TOKENIZER_TRAINING_BYTES // len(shards)
    total = sum(s.size_bytes for s in shards)

    def texts() -> Iterator[str]:
        done = 0
        for shard in shards:
            used = 0
            for item in read(shard, data):
                if isinstance(item, Document) and split_of(item.text) == "train":
                    yield item.text
                    used += len(item.text)
                if used > budget:
                    break
            done += shard.size_bytes
            progress("training the tokenizer", done, total)

    storage.write_atomic(path, vocabulary.make(data.tokenizer, texts).to_str().encode())


def _tokenize_missing(
    data: DataConfig, shards: list[CorpusShard], folder: Folder, progress: Progress, run_tasks: TaskRunner
) -> list[dict[str, Any]]:
    """Tokenizes every shard whose part does not exist yet. Returns the counts of all parts, in the order of the shards."""
    storage.make_folder(folder / "parts")
    made = {path.name for path in (folder / "parts").glob("*.json")}
    todo = [TokenizeTask(data, s, i, folder) for i, s in enumerate(shards) if _part_path(folder, i, "json").name not in made]
    total = sum(s.size_bytes for s in shards)
    done = total - sum(task.shard.size_bytes for task in todo)
    for task in run_tasks(todo) if todo else ():
        done += task.shard.size_bytes
        progress("tokenizing", done, total)
    return [json.loads(_part_path(folder, i, "json").read_text()) for i in range(len(shards))]


@functools.cache
def _tokenizer(path: Folder, threads: int) -> Tokenizer:
    """The tokenizer of a corpus, loaded once per process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    return vocabulary.load(path)


def tokenize(task: TokenizeTask) -> None:
    """Tokenizes one shard to its part files: a token stream per split, the list of bad records, and a JSON file of counts.

    The JSON file is written last; a part is complete when it exists. Raises FailedError if the shard's files have changed since
    they were listed.
    """
    check_unchanged(task.shard)
    folder, index = task.folder, task.index
    tokenizer = _tokenizer(folder / TOKENIZER, task.threads)
    end = vocabulary.end_of_text_id(tokenizer)
    dtype = token_dtype(vocabulary.size(tokenizer))
    counts: dict[str, Any] = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
    bad_records: Counter[str] = Counter()
    with storage.staging_dir(folder / "parts") as local:
        with ExitStack() as files:
            listing = files.enter_context(open(local / "problems", "w", encoding="utf-8"))
            streams = {split: files.enter_context(open(local / f"{split}.bin", "wb")) for split in SPLITS}
            items = read(task.shard, task.data)
            while batch := _next_batch(items, listing, bad_records):
                for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
                    split = split_of(text)
                    ids = encoding.ids
                    ids.append(end)
                    np.asarray(ids, dtype).tofile(streams[split])
                    counts[split]["tokens"] += len(ids)
                    counts[split]["bytes"] += len(text.encode())
                    counts[split]["documents"] += 1
        for name in ("problems", *(f"{split}.bin" for split in SPLITS)):
            storage.move_file(local / name, _part_path(folder, index, name))
    storage.write_atomic(_part_path(folder, index, "json"), json.dumps(counts | {"problems": bad_records}).encode())


def _next_batch(items: Iterator[Document | BadRecord], listing: Any, bad_records: Counter[str]) -> list[str]:
    """The next documents, about ENCODE_BYTES of text. Bad records among them are counted and written to `listing`."""
    batch: list[str] = []
    size = 0
    for item in items:
        if isinstance(item, BadRecord):
            bad_records[item.reason] += 1
            listing.write(json.dumps({"place": item.location, "problem": item.reason}, ensure_ascii=False) + "\n")
            continue
        batch.append(item.text)
        size += len(item.text)
        if size >= ENCODE_BYTES:
            break
    return batch


def _check_bad_records(data: DataConfig, shards: list[CorpusShard], counts: list[dict[str, Any]], folder: Folder) -> None:
    """Raises ConfigError if more than `max_bad_share` of the documents, or of the files, could not be read."""
    bad_records = sum((Counter(c["problems"]) for c in counts), Counter())
    documents = sum(c[split]["documents"] for c in counts for split in SPLITS)
    files = sum(len(s.paths) for s in shards)
    unreadable = sum(n for reason, n in bad_records.items() if reason.startswith("unreadable"))
    bad = sum(bad_records.values())
    if not documents or bad > data.max_bad_share * (bad + documents) or unreadable > data.max_bad_share * files:
        listings = (_part_path(folder, i, "problems") for i in range(len(shards)))
        lines = (line for listing in listings for line in listing.read_text(encoding="utf-8").splitlines())
        first = "; ".join(f"{row['place']} {row['problem']}" for row in map(json.loads, islice(lines, 3)))
        reasons = ", ".join(f"{n} {reason}" for reason, n in bad_records.most_common())
        raise ConfigError(
            f"{bad} of {bad + documents} documents cannot be used ({reasons}), more than data.max_bad_share = "
            f"{data.max_bad_share}; first: {first}. Repair the corpus, set data.text_field, or raise data.max_bad_share"
        )
    for split in ("train", "validation"):
        if not sum(c[split]["documents"] for c in counts):
            raise ConfigError(f"none of the {documents} documents falls into the {split} split; give a larger corpus")


def _merge_parts(data: DataConfig, n_parts: int, counts: list[dict[str, Any]], folder: Folder) -> None:
    """Concatenates the parts to one token stream per split and writes problems.jsonl and, last, manifest.json."""
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        paths = [_part_path(folder, i, f"{split}.bin") for i in range(n_parts)]
        sums = {key: sum(c[split][key] for c in counts) for key in ("tokens", "bytes", "documents")}
        splits[split] = sums | {"sha256": _concatenate(paths, folder / f"{split}.bin")}
    _concatenate([_part_path(folder, i, "problems") for i in range(n_parts)], folder / PROBLEMS)
    tokenizer = vocabulary.load(folder / TOKENIZER)
    content = {"tokenizer": vocabulary.digest(tokenizer), **{split: entry["sha256"] for split, entry in splits.items()}}
    manifest = Manifest(
        format=FORMAT,
        source=data.source if data.source == "python-stdlib" else " ".join(data.files) or str(data.dataset),
        split_rule=SPLIT_RULE,
        vocab_tokens=vocabulary.size(tokenizer),
        end_of_text_id=vocabulary.end_of_text_id(tokenizer),
        dtype=token_dtype(vocabulary.size(tokenizer)),
        tokenizer_digest=content["tokenizer"],
        splits=splits,
        problems=dict(sum((Counter(c["problems"]) for c in counts), Counter())),
        data_digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
    )
    storage.write_atomic(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def token_dtype(vocab_tokens: int) -> str:
    """numpy dtype of a token on disk: little-endian unsigned, 2 or 4 bytes."""
    return "<u2" if vocab_tokens <= 2**16 else "<u4"


def _part_path(folder: Folder, index: int, suffix: str) -> Folder:
    return folder / "parts" / f"{index:06d}.{suffix}"


def _concatenate(paths: list[Folder], to: Folder) -> str:
    """Concatenates files to one, written atomically. Returns its sha256."""
    sha = hashlib.sha256()
    with storage.open_atomic(to) as out:
        for path in paths:
            with path.open("rb") as part:
                while chunk := part.read(1 << 22):
                    sha.update(chunk)
                    out.write(chunk)
    return sha.hexdigest()
