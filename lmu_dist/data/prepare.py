"""Text to tokens, once: a DataConfig in; one memory-mapped stream per split, tokenizer.json and manifest.json out.

Restartable: each unit of the corpus becomes a part of its own, on any machine, parts are joined in a fixed order, and every
file appears whole or not at all. Kill it anywhere and call it again: it goes on, and the result is the same byte for byte.
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

from lmu_dist import storage as places
from lmu_dist.config import ConfigError, DataConfig, FailedError, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.corpus import Corpus, open_corpus
from lmu_dist.data.manifest import FORMAT, MANIFEST, PROBLEMS, TOKENIZER, Manifest, locate
from lmu_dist.data.sources import Document, Problem, Unit, check_unchanged, list_units, read

SPLITS = {"train": range(96), "validation": range(96, 99), "test": range(99, 100)}
SPLIT_RULE = "sha256 of the document's UTF-8, first 8 bytes as a number, modulo 100: 0-95 train, 96-98 validation, 99 test"
TOKENIZER_TRAINING_BYTES = 64_000_000  # of training documents, spread over all units
ENCODE_BYTES = 1_000_000  # of text given to the tokenizer at once
Progress = Callable[..., None]  # what is being done, how much is done (here in bytes), of how much, and words about it


@dataclass(frozen=True)
class Part:
    """One unit of a corpus to be tokenized, on this machine or another of the cluster."""

    data: DataConfig
    unit: Unit
    index: int
    folder: Folder  # of the corpus
    threads: int = 1


Spread = Callable[[Sequence[Part]], Iterator[Part]]  # runs `tokenize` on each, in any order, and yields what is done


def in_processes(parts: Sequence[Part]) -> Iterator[Part]:
    """Spreads parts over the cores of this machine."""
    cpus = len(os.sched_getaffinity(0))
    n_processes = min(cpus, len(parts))
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn")) as pool:
        threads = max(1, cpus // n_processes)
        futures = {pool.submit(tokenize, replace(part, threads=threads)): part for part in parts}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as e:
            raise FailedError("preparing failed: a tokenizing process was killed, for want of memory perhaps") from e
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prepare(data: DataConfig, storage: Folder, progress: Progress = lambda *_: None, spread: Spread = in_processes) -> Corpus:
    """Prepares a corpus, or finds it prepared; what is half done is never mistaken for done. Raises ConfigError."""
    units = list_units(data)
    folder = locate(data, storage, units)
    if (folder / MANIFEST).exists() and not (folder / "parts").exists():
        return open_corpus(folder)
    here = places.beside(folder)
    places.make_folder(here)
    try:
        with FileLock(here / "lock", timeout=0):
            if not (folder / MANIFEST).exists():
                _ensure_tokenizer(data, units, folder, progress)
                facts = _tokenize(data, units, folder, progress, spread)
                _check_problems(data, units, facts, folder)
                _join(data, len(units), facts, folder)
            places.remove(folder / "parts")
    except FileNotFoundError:
        # At a URI the lock is one machine's: another may have been at it too, and have finished.
        if not (folder / MANIFEST).exists():
            raise
    except Timeout as e:
        raise ConfigError(f"{folder} is being prepared by another process; wait for it, then start again") from e
    return open_corpus(folder)


def split_of(text: str) -> str:
    """The split a document belongs to, by its content alone (SPLIT_RULE)."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def _ensure_tokenizer(data: DataConfig, units: list[Unit], folder: Folder, progress: Progress) -> None:
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

    places.write_whole(path, vocabulary.make(data.tokenizer, texts).to_str().encode())


def _tokenize(data: DataConfig, units: list[Unit], folder: Folder, progress: Progress, spread: Spread) -> list[dict[str, Any]]:
    """Facts about every part, after making those that are missing."""
    places.make_folder(folder / "parts")
    made = {path.name for path in (folder / "parts").glob("*.json")}
    todo = [Part(data, unit, i, folder) for i, unit in enumerate(units) if _part(folder, i, "json").name not in made]
    total = sum(u.size_bytes for u in units)
    done = total - sum(part.unit.size_bytes for part in todo)
    for part in spread(todo) if todo else ():
        done += part.unit.size_bytes
        progress("tokenizing", done, total)
    return [json.loads(_part(folder, i, "json").read_text()) for i in range(len(units))]


@functools.cache
def _tokenizer(path: Folder, threads: int) -> Tokenizer:
    """Loaded once in a process: a corpus never changes its tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    return vocabulary.load(path)


def tokenize(part: Part) -> None:
    """Makes one part: a stream per split, the list of problems, and last the facts, whose presence says the part is whole.

    Raises FailedError if the files of the unit are not those that were listed.
    """
    check_unchanged(part.unit)
    folder, index = part.folder, part.index
    tokenizer = _tokenizer(folder / TOKENIZER, part.threads)
    end = vocabulary.end_of_text_id(tokenizer)
    dtype = token_dtype(vocabulary.size(tokenizer))
    facts: dict[str, Any] = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
    problems: Counter[str] = Counter()
    with places.staging(folder / "parts") as local:
        with ExitStack() as files:
            listing = files.enter_context(open(local / "problems", "w", encoding="utf-8"))
            streams = {split: files.enter_context(open(local / f"{split}.bin", "wb")) for split in SPLITS}
            items = read(part.unit, part.data)
            while batch := _take(items, listing, problems):
                for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
                    split = split_of(text)
                    ids = encoding.ids
                    ids.append(end)
                    np.asarray(ids, dtype).tofile(streams[split])
                    facts[split]["tokens"] += len(ids)
                    facts[split]["bytes"] += len(text.encode())
                    facts[split]["documents"] += 1
        for name in ("problems", *(f"{split}.bin" for split in SPLITS)):
            places.put(local / name, _part(folder, index, name))
    places.write_whole(_part(folder, index, "json"), json.dumps(facts | {"problems": problems}).encode())


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


def _check_problems(data: DataConfig, units: list[Unit], facts: list[dict[str, Any]], folder: Folder) -> None:
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


def _join(data: DataConfig, n_parts: int, facts: list[dict[str, Any]], folder: Folder) -> None:
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
    places.write_whole(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def token_dtype(vocab_tokens: int) -> str:
    """Little-endian type of one token on disk."""
    return "<u2" if vocab_tokens <= 2**16 else "<u4"


def _part(folder: Folder, index: int, suffix: str) -> Folder:
    return folder / "parts" / f"{index:06d}.{suffix}"


def _concatenate(paths: list[Folder], to: Folder) -> str:
    """Joins files into one that appears at once, and returns its sha256."""
    sha = hashlib.sha256()
    with places.writing(to) as out:
        for path in paths:
            with path.open("rb") as part:
                while chunk := part.read(1 << 22):
                    sha.update(chunk)
                    out.write(chunk)
    return sha.hexdigest()
