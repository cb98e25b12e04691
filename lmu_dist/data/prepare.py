"""Text to tokens, once: a DataConfig in; one memory-mapped stream per split, tokenizer.json and manifest.json out.

Restartable: each unit of the corpus becomes a part of its own, parts are joined in a fixed order, and every file
appears whole or not at all. Kill it anywhere and call it again: it goes on, and the result is the same byte for byte.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from lmu_dist.config import ConfigError, DataConfig, FailedError
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.corpus import Corpus, open_corpus
from lmu_dist.data.manifest import FORMAT, MANIFEST, PROBLEMS, TOKENIZER, Manifest, locate
from lmu_dist.data.sources import Document, Problem, Unit, list_units, read

SPLITS = {"train": range(96), "validation": range(96, 99), "test": range(99, 100)}
SPLIT_RULE = "sha256 of the document's UTF-8, first 8 bytes as a number, modulo 100: 0-95 train, 96-98 validation, 99 test"
TOKENIZER_TRAINING_BYTES = 64_000_000  # of training documents, spread over all units
ENCODE_BYTES = 1_000_000  # of text given to the tokenizer at once
Progress = Callable[..., None]  # what is being done, how much is done (here in bytes), of how much, and words about it


def prepare(data: DataConfig, storage: Path, progress: Progress = lambda *_: None) -> Corpus:
    """Prepares a corpus, or finds it prepared; what is half done is never mistaken for done. Raises ConfigError."""
    units = list_units(data)
    folder = locate(data, storage, units)
    if (folder / MANIFEST).exists() and not (folder / "parts").exists():
        return open_corpus(folder)
    parts = folder / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            if not (folder / MANIFEST).exists():
                _ensure_tokenizer(data, units, folder, progress)
                facts = _tokenize(data, units, folder, progress)
                _check_problems(data, units, facts, folder)
                _join(data, len(units), facts, folder)
            shutil.rmtree(parts, ignore_errors=True)
    except Timeout as e:
        raise ConfigError(f"{folder} is being prepared by another process; wait for it, then start again") from e
    return open_corpus(folder)


def split_of(text: str) -> str:
    """The split a document belongs to, by its content alone (SPLIT_RULE)."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def _ensure_tokenizer(data: DataConfig, units: list[Unit], folder: Path, progress: Progress) -> None:
    path = folder / TOKENIZER
    if path.exists():
        return
    budget = TOKENIZER_TRAINING_BYTES // len(units)
    total = sum(u.size_bytes for u in units)

    def texts() -> Iterator[str]:
        done = 0
        for unit in units:
            used = 0
            for item in read(unit, data):
                if isinstance(item, Document) and split_of(item.text) == "train":
                    yield item.text
                    used += len(item.text)
                if used > budget:
                    break
            done += unit.size_bytes
            progress("training the tokenizer", done, total)

    _write(path, vocabulary.make(data.tokenizer, texts).to_str().encode())


def _tokenize(data: DataConfig, units: list[Unit], folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """Facts about every part, after making those that are missing."""
    (folder / "parts").mkdir(exist_ok=True)
    todo = [i for i in range(len(units)) if not _part(folder, i, "json").exists()]
    total, done = sum(u.size_bytes for u in units), sum(u.size_bytes for u in units) - sum(units[i].size_bytes for i in todo)
    cpus = len(os.sched_getaffinity(0))
    n_processes = min(cpus, len(todo))
    if todo:
        threads = max(1, cpus // n_processes)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(n_processes, context, _start_process, (folder / TOKENIZER, threads)) as pool:
            futures = {pool.submit(_tokenize_unit, data, units[i], folder, i): i for i in todo}
            try:
                for future in as_completed(futures):
                    future.result()
                    done += units[futures[future]].size_bytes
                    progress("tokenizing", done, total)
            except BrokenProcessPool as e:
                raise FailedError("preparing failed: a tokenizing process was killed, for want of memory perhaps") from e
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [json.loads(_part(folder, i, "json").read_text()) for i in range(len(units))]


_tokenizer: Tokenizer  # of a pool process


def _start_process(path: Path, threads: int) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    _tokenizer = vocabulary.load(path)


def _tokenize_unit(data: DataConfig, unit: Unit, folder: Path, index: int) -> None:
    """One part: a stream per split, the list of problems, and last the facts, whose presence says the part is whole."""
    end = vocabulary.end_of_text_id(_tokenizer)
    dtype = token_dtype(vocabulary.size(_tokenizer))
    facts: dict[str, Any] = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
    problems: Counter[str] = Counter()
    with ExitStack() as files:
        listing = files.enter_context(open(_part(folder, index, "problems"), "w", encoding="utf-8"))
        streams = {split: files.enter_context(open(_part(folder, index, f"{split}.bin"), "wb")) for split in SPLITS}
        items = read(unit, data)
        while batch := _take(items, listing, problems):
            for text, encoding in zip(batch, _tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
                split = split_of(text)
                ids = encoding.ids
                ids.append(end)
                np.asarray(ids, dtype).tofile(streams[split])
                facts[split]["tokens"] += len(ids)
                facts[split]["bytes"] += len(text.encode())
                facts[split]["documents"] += 1
    _write(_part(folder, index, "json"), json.dumps(facts | {"problems": problems}).encode())


def _take(items: Iterator[Document | Problem], listing: Any, problems: Counter[str]) -> list[str]:
    """The next documents, about ENCODE_BYTES of them; problems on the way are counted and listed."""
    batch: list[str] = []
    size = 0
    for item in items:
        if isinstance(item, Problem):
            problems[item.kind] += 1
            listing.write(json.dumps({"place": item.place, "problem": item.kind}, ensure_ascii=False) + "\n")
            continue
        batch.append(item.text)
        size += len(item.text)
        if size >= ENCODE_BYTES:
            break
    return batch


def _check_problems(data: DataConfig, units: list[Unit], facts: list[dict[str, Any]], folder: Path) -> None:
    """Raises ConfigError when more than the allowed share of documents, or of files, could not be read."""
    problems = sum((Counter(f["problems"]) for f in facts), Counter())
    documents = sum(f[split]["documents"] for f in facts for split in SPLITS)
    files = sum(len(u.paths) for u in units)
    unreadable = sum(n for kind, n in problems.items() if kind.startswith("unreadable"))
    bad = sum(problems.values())
    if not documents or bad > data.max_bad_share * (bad + documents) or unreadable > data.max_bad_share * files:
        listings = (_part(folder, i, "problems") for i in range(len(units)))
        lines = (line for listing in listings for line in listing.read_text(encoding="utf-8").splitlines())
        first = "; ".join(f"{row['place']} {row['problem']}" for row in map(json.loads, islice(lines, 3)))
        kinds = ", ".join(f"{n} {kind}" for kind, n in problems.most_common())
        raise ConfigError(
            f"{bad} of {bad + documents} documents cannot be used ({kinds}), more than data.max_bad_share = "
            f"{data.max_bad_share}; first: {first}. Mend the corpus, set data.text_field, or raise the share"
        )
    for split in ("train", "validation"):
        if not sum(f[split]["documents"] for f in facts):
            raise ConfigError(f"none of the {documents} documents falls into the {split} split; give a larger corpus")


def _join(data: DataConfig, n_parts: int, facts: list[dict[str, Any]], folder: Path) -> None:
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        names = [_part(folder, i, f"{split}.bin") for i in range(n_parts)]
        sums = {key: sum(f[split][key] for f in facts) for key in ("tokens", "bytes", "documents")}
        splits[split] = sums | {"sha256": _concatenate(names, folder / f"{split}.bin")}
    _concatenate([_part(folder, i, "problems") for i in range(n_parts)], folder / PROBLEMS)
    tokenizer = vocabulary.load(folder / TOKENIZER)
    content = {"tokenizer": vocabulary.digest(tokenizer), **{split: facts["sha256"] for split, facts in splits.items()}}
    manifest = Manifest(
        format=FORMAT,
        source=data.source if data.source == "python-stdlib" else " ".join(data.files) or str(data.dataset),
        split_rule=SPLIT_RULE,
        vocab_tokens=vocabulary.size(tokenizer),
        end_of_text_id=vocabulary.end_of_text_id(tokenizer),
        dtype=token_dtype(vocabulary.size(tokenizer)),
        tokenizer_digest=content["tokenizer"],
        splits=splits,
        problems=dict(sum((Counter(f["problems"]) for f in facts), Counter())),
        data_digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
    )
    _write(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def token_dtype(vocab_tokens: int) -> str:
    """Little-endian type of one token on disk."""
    return "<u2" if vocab_tokens <= 2**16 else "<u4"


def _part(folder: Path, index: int, suffix: str) -> Path:
    return folder / "parts" / f"{index:06d}.{suffix}"


def _concatenate(paths: list[Path], to: Path) -> str:
    """Joins files into one that appears at once, and returns its sha256."""
    sha = hashlib.sha256()
    partial = to.with_name(to.name + ".partial")
    with open(partial, "wb") as out:
        for path in paths:
            with open(path, "rb") as part:
                while chunk := part.read(1 << 22):
                    sha.update(chunk)
                    out.write(chunk)
        os.fsync(out.fileno())
    partial.replace(to)
    return sha.hexdigest()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as out:
        out.write(content)
        os.fsync(out.fileno())
    partial.replace(path)
