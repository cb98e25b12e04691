"""Corpus preparation: a DataConfig in; one memory-mapped token stream per split, tokenizer.json and manifest.json out.

It can be killed and restarted at any point; the result is the same byte for byte. Each corpus shard is tokenized to part files
of its own, on any machine. Parts are concatenated in a fixed order. All files are written atomically.
"""

import errno
import functools
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Integer
from tokenizers import Tokenizer

from lmu_dist import pools, storage
from lmu_dist.config import ConfigError, DataConfig, FailedError, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.corpus import Corpus, open_corpus
from lmu_dist.data.documents import BadRecord, CorpusShard, Document, counts_as_bad
from lmu_dist.data.manifest import FORMAT, MANIFEST, PROBLEMS, TOKENIZER, Manifest, corpus_folder, locate, remember_folder
from lmu_dist.data.sources import check_unchanged, read, split_shards

__all__ = ["Progress", "TokenizeTask", "corpus_folder", "prepare", "run_in_processes", "split_of", "tokenize"]

LAYOUT = "layout"  # file in the folder `parts`: digest of the shards that the parts belong to
NOTES = "notes"  # file in the folder `parts`: the notes of the tokenizer
SPLITS = {"train": range(96), "validation": range(96, 99), "test": range(99, 100)}
SPLIT_RULE = (
    "sha256 of the document's UTF-8 without white space and with letter case folded, first 8 bytes as a number, modulo 100: "
    "0-95 train, 96-98 validation, 99 test; a document that the data set itself assigns to a split is in that one"
)
SMALL_CORPUS_BYTES = 1_000_000  # a corpus of less is read once more if needed, so that it has documents to validate on
TOKENIZER_TRAINING_BYTES = 64_000_000  # text that a BPE tokenizer is trained on, taken evenly from all shards
ENCODE_BYTES = 500_000  # text per call of the tokenizer
ROUND_TRIP_BYTES = 64_000  # text at the start of every shard that is decoded again, even if the tokenizer cannot lose any
PROGRESS_SECONDS = 0.5  # between two calls of a Progress, at most, while work goes on
Progress = Callable[..., None]  # called with: activity, amount done (here in bytes), total amount, optional text


@dataclass(frozen=True)
class TokenizeTask:
    """A corpus shard to tokenize, on this machine or another node of the cluster."""

    data: DataConfig
    shard: CorpusShard
    index: int  # of the shard, in the corpus
    folder: Folder  # of the corpus
    threads: int = 1
    shift: int = 0  # see `_split_shift`


# Runs `tokenize` on every task, in any order. Yields the bytes of the corpus that are done (as in CorpusShard.size_bytes), and
# the bytes of text in them, or 0 if it does not know. Both count from the start of the call.
TaskRunner = Callable[[Sequence[TokenizeTask]], Generator[tuple[int, int], None, None]]


def run_in_processes(tasks: Sequence[TokenizeTask]) -> Generator[tuple[int, int], None, None]:
    """Runs the tasks in a pool of processes on the CPUs of this machine (a TaskRunner)."""
    cpus = len(os.sched_getaffinity(0))
    n_processes = min(cpus, len(tasks))
    threads = max(1, cpus // n_processes)
    text_bytes = pools.context.RawArray("q", len(tasks))  # of each task so far; only the process that runs it writes to it
    waiting, running = iter(enumerate(tasks)), dict[Future[None], int]()
    finished = finished_text = most = 0  # bytes
    with pools.process_pool(n_processes, _set_counters, (text_bytes,)) as pool:
        try:
            while True:
                for i, task in islice(waiting, 2 * n_processes - len(running)):
                    running[pool.submit(_tokenize_and_count, replace(task, threads=threads), i)] = i
                if not running:
                    return
                done, _ = wait(running, PROGRESS_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                    i = running.pop(future)
                    finished += tasks[i].shard.size_bytes
                    finished_text += text_bytes[i]
                # Compressed files have more bytes of text than they have on disk. Finished shards show how many.
                ratio = max(1.0, finished_text / finished) if finished else 1.0
                shards = {i: tasks[i].shard for i in running.values()}
                begun = sum(min(int(text_bytes[i] / ratio), s.size_bytes) for i, s in shards.items() if s.shard is None)
                most = max(most, finished + begun)
                yield most, finished_text + sum(text_bytes[i] for i in running.values())
        except BrokenProcessPool as e:
            raise FailedError("preparing failed: a tokenizing process was killed, perhaps because memory ran out") from e


_counters: Any = None  # in a tokenizing process: the array `text_bytes` of `run_in_processes`


def _set_counters(counters: Any) -> None:
    global _counters
    _counters = counters


def _tokenize_and_count(task: TokenizeTask, number: int) -> None:
    def count(n_bytes: int) -> None:
        _counters[number] += n_bytes

    tokenize(task, count)


def prepare(
    data: DataConfig,
    storage_folder: Folder,
    progress: Progress = lambda *_: None,
    run_tasks: TaskRunner = run_in_processes,
) -> Corpus:
    """Prepares a corpus below `storage_folder` and opens it. If it is already prepared, only opens it.

    Raises ConfigError if too much of the corpus cannot be read, if the tokenizer does not give text back, if a prepared file is
    damaged, or if another process is preparing it.
    """
    location = locate(data, storage_folder)
    folder = location.folder
    if not location.prepared or (folder / "parts").exists():
        assert location.shards is not None or location.prepared
        with _full_disk_as_error(folder):
            _prepare(data, location.shards or [], folder, progress, run_tasks)
    corpus = open_corpus(folder, progress)
    if location.shards is not None:
        with suppress(OSError):  # the index only saves time
            remember_folder(data, storage_folder, folder)
    return replace(corpus, notes=(*corpus.manifest.notes, *([location.note] if location.note else [])))


def _prepare(data: DataConfig, shards: list[CorpusShard], folder: Folder, progress: Progress, run_tasks: TaskRunner) -> None:
    state_dir = storage.local_state_dir(folder)
    storage.make_folder(state_dir)
    try:
        with FileLock(state_dir / "lock", timeout=0):
            if not (folder / MANIFEST).exists():
                parts = split_shards(shards, data, progress)
                _clean_up(parts, folder)
                shift = _split_shift(data, parts)
                _ensure_tokenizer(data, parts, folder, progress, shift)
                counts = _tokenize_missing(data, parts, folder, progress, run_tasks, shift)
                _check_bad_records(data, sum(len(s.paths) for s in shards), counts, folder)
                _merge_parts(data, counts, folder, progress, shift)
            storage.remove(folder / "parts")
    except FileNotFoundError:
        # For a URI the lock holds on this machine only: another machine may have finished the corpus and deleted the parts.
        if not (folder / MANIFEST).exists():
            raise
    except Timeout as e:
        raise ConfigError(f"{folder} is being prepared by another process; wait until it has finished, then start again") from e


def _clean_up(shards: list[CorpusShard], folder: Folder) -> None:
    """Deletes what an interrupted preparation left behind and cannot be used: unfinished parts, and what is of other shards.

    Another version may divide the corpus otherwise. The parts, and the text that the tokenizer is trained on, depend on that.
    """
    parts = folder / "parts"
    layout = hashlib.sha256(repr(shards).encode()).hexdigest().encode()
    if not (parts / LAYOUT).is_file() or (parts / LAYOUT).read_bytes() != layout:
        storage.remove(parts)
        if (folder / TOKENIZER).exists():
            (folder / TOKENIZER).unlink()
        storage.make_folder(parts)
        storage.write_atomic(parts / LAYOUT, layout)
    if isinstance(parts, Path):
        for unfinished in parts.glob(f"{storage.STAGING}*"):
            storage.remove(unfinished)


@contextmanager
def _full_disk_as_error(folder: Folder) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FailedError(f"the disk is full while preparing {folder}; free some space, what is finished is kept") from e


def split_of(text: str, shift: int = 0) -> str:
    """The split of a document, which depends on its content only (SPLIT_RULE), with its number shifted by `shift`.

    Documents that differ only in white space or letter case are in the same split, so that none is both trained on and tested.
    """
    return _split_of_number(_split_number(text) + shift)


def _split_number(text: str) -> int:
    normal_form = "".join(text.split()).casefold()
    return int.from_bytes(hashlib.sha256(normal_form.encode()).digest()[:8]) % 100


def _split_of_number(number: int) -> str:
    return next(name for name, numbers in SPLITS.items() if number % 100 in numbers)


def _split_shift(data: DataConfig, shards: list[CorpusShard]) -> int:
    """How far the numbers of SPLIT_RULE are shifted: 0, but in a small corpus as far as every split needs to have a document.

    By chance, none of 60 documents falls into validation one time in six.
    """
    on_the_hub = any(shard.shard and not shard.stamp for shard in shards)  # of unknown size
    if on_the_hub or data.dataset_validation_split or sum(shard.size_bytes for shard in shards) > SMALL_CORPUS_BYTES:
        return 0
    numbers = {_split_number(i.text) for shard in shards for i in read(shard, data) if isinstance(i, Document)}
    splits = [{_split_of_number(number + shift) for number in numbers} for shift in range(100)]
    if {"train", "validation"} <= splits[0]:
        return 0
    return max(range(100), key=lambda shift: (len(splits[shift] & {"train", "validation"}), len(splits[shift]), -shift))


def _split_of_document(document: Document, data: DataConfig, shift: int) -> str:
    """The split that the data set assigns, or else that of the text. A data set's own validation split is the only one."""
    split = document.split or split_of(document.text, shift)
    return "train" if document.split is None and split == "validation" and data.dataset_validation_split else split


def _ensure_tokenizer(data: DataConfig, shards: list[CorpusShard], folder: Folder, progress: Progress, shift: int) -> None:
    """Writes tokenizer.json unless it exists. A BPE tokenizer is trained on training documents from all shards."""
    path = folder / TOKENIZER
    if path.exists():
        return
    budget = TOKENIZER_TRAINING_BYTES // len(shards)
    total, done, phase = sum(s.size_bytes for s in shards), 0, "reading text"

    def texts() -> Iterator[str]:
        nonlocal done, phase
        finished = 0
        for shard in shards:
            used = 0
            for item in read(shard, data):
                if isinstance(item, Document) and _split_of_document(item, data, shift) == "train":
                    yield item.text
                    used += len(item.text)
                    done = finished + int(shard.size_bytes * min(1.0, used / max(1, budget)))
                if used > budget:
                    break
            done = finished = finished + shard.size_bytes
        phase = "merging pairs"

    with _regularly(lambda: progress("training the tokenizer", done, total, phase)):
        tokenizer, notes = vocabulary.make(data.tokenizer, texts)
    storage.write_atomic(folder / "parts" / NOTES, json.dumps(notes).encode())
    storage.write_atomic(path, tokenizer.to_str().encode())


@contextmanager
def _regularly(report: Callable[[], None]) -> Iterator[None]:
    """Calls `report` every PROGRESS_SECONDS from a thread, and once at the end."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            report()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    report()


def _tokenize_missing(
    data: DataConfig, shards: list[CorpusShard], folder: Folder, progress: Progress, run_tasks: TaskRunner, shift: int
) -> list[dict[str, Any]]:
    """Tokenizes every shard whose part does not exist yet. Returns the counts of all parts, in the order of the shards."""
    storage.make_folder(folder / "parts")
    made = {path.name for path in (folder / "parts").glob("*.json")}
    tasks = (TokenizeTask(data, shard, i, folder, shift=shift) for i, shard in enumerate(shards))
    todo = [task for task in tasks if _part_path(folder, task.index, "json").name not in made]
    total = sum(s.size_bytes for s in shards)
    made_before = total - sum(task.shard.size_bytes for task in todo)
    if todo:
        with closing(run_tasks(todo)) as runner:
            for done, text in runner:
                progress("tokenizing", made_before + done, total, f"{text / 1e6:,.1f} MB of text" if text else "")
    return [json.loads(_part_path(folder, i, "json").read_text()) for i in range(len(shards))]


@dataclass(frozen=True)
class _Encoder:
    """A corpus's tokenizer, and what has to be known of it to encode."""

    tokenizer: Tokenizer
    end: int  # id of the end-of-text token
    is_lossless: bool  # as its parts prove; else every document is decoded again
    dtype: str

    def encode(self, batch: Sequence[Document], check_bytes: int) -> list[Integer[np.ndarray, "tokens"]]:
        """The ids of each document, with the end-of-text token after them.

        The first `check_bytes` of text are decoded again, and all of it if the tokenizer may lose text. Raises ConfigError if a
        document does not come back, or contains the end-of-text token.
        """
        encodings = self.tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        all_ids = [encoding.ids for encoding in encodings]
        n_checked = 0
        while n_checked < len(batch) and (check_bytes > 0 or not self.is_lossless):
            check_bytes -= len(batch[n_checked].text)
            n_checked += 1
        decoded = self.tokenizer.decode_batch(all_ids[:n_checked], skip_special_tokens=False)
        for document, text in zip(batch, decoded, strict=False):
            if not vocabulary.same_text(document.text, text):
                loss = vocabulary.describe_loss(self.tokenizer, document.text, text)
                raise ConfigError(
                    f"data.tokenizer does not give text back, so bits per byte would be false: {loss}, at {document.location}; "
                    "take a byte-level tokenizer, such as data.tokenizer.kind: bpe"
                )
        result = []
        for document, ids in zip(batch, all_ids, strict=True):
            array = np.asarray([*ids, self.end], self.dtype)
            if np.count_nonzero(array == self.end) != 1:
                raise ConfigError(
                    f"data.tokenizer: {document.location} contains the characters of the end-of-text token, and this tokenizer "
                    "cannot encode them as text; set data.tokenizer.end_of_text to another token, or take another tokenizer"
                )
            result.append(array)
        return result


@functools.cache
def _encoder(path: Folder, end_of_text: str | None, threads: int) -> _Encoder:
    """The tokenizer of a corpus, loaded once per process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    tokenizer = vocabulary.load(path, end_of_text)
    end, dtype = vocabulary.end_of_text_id(tokenizer, end_of_text), token_dtype(vocabulary.size(tokenizer))
    return _Encoder(tokenizer, end, vocabulary.is_lossless(tokenizer), dtype)


def tokenize(task: TokenizeTask, count: Callable[[int], None] = lambda _: None) -> None:
    """Tokenizes one shard to its part files: a token stream per split, the list of bad records, and a JSON file of counts.

    The JSON file is written last; a part is complete when it exists. Calls `count` with the bytes of text of every batch.
    Raises FailedError if the shard's files have changed since they were listed, ConfigError if the tokenizer loses text.
    """
    check_unchanged(task.shard)
    folder, index = task.folder, task.index
    encoder = _encoder(folder / TOKENIZER, task.data.tokenizer.end_of_text, task.threads)
    counts: dict[str, Any] = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
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
                    split = _split_of_document(document, task.data, task.shift)
                    # Not ndarray.tofile, whose error says nothing of a full disk.
                    streams[split].write(ids.data)
                    n_bytes = len(document.text.encode())
                    counts[split]["tokens"] += len(ids)
                    counts[split]["bytes"] += n_bytes
                    counts[split]["documents"] += 1
                    batch_bytes += n_bytes
                unchecked_bytes -= batch_bytes
                count(batch_bytes)
        for name in ("problems", *(f"{split}.bin" for split in SPLITS)):
            storage.move_file(local / name, _part_path(folder, index, name))
    storage.write_atomic(_part_path(folder, index, "json"), json.dumps(counts | {"problems": bad_records}).encode())


def _next_batch(items: Iterator[Document | BadRecord], listing: Any, bad_records: Counter[str]) -> list[Document]:
    """The next documents, about ENCODE_BYTES of text. Bad records among them are counted and written to `listing`."""
    batch: list[Document] = []
    size = 0
    for item in items:
        if isinstance(item, BadRecord):
            bad_records[item.reason] += 1
            listing.write(json.dumps({"place": item.location, "problem": item.reason}, ensure_ascii=False) + "\n")
            continue
        batch.append(item)
        size += len(item.text)
        if size >= ENCODE_BYTES:
            break
    return batch


def _check_bad_records(data: DataConfig, n_files: int, counts: list[dict[str, Any]], folder: Folder) -> None:
    """Raises ConfigError if more than `max_bad_share` of the documents, or of the files, could not be read."""
    reasons = sum((Counter(c["problems"]) for c in counts), Counter())
    bad = Counter({reason: n for reason, n in reasons.items() if counts_as_bad(reason, data)})
    bad_files = Counter({reason: n for reason, n in bad.items() if reason.startswith("unreadable")})
    bad_documents = bad - bad_files
    n_documents = sum(c[split]["documents"] for c in counts for split in SPLITS)

    def first(wanted: Counter[str]) -> str:
        listings = (_part_path(folder, i, "problems") for i in range(len(counts)))
        lines = (json.loads(line) for listing in listings for line in listing.read_text(encoding="utf-8").splitlines())
        return "; ".join(islice((f"{row['place']} {row['problem']}" for row in lines if row["problem"] in wanted), 3))

    n_all_documents = n_documents + bad_documents.total()
    for kind, found, n_all, fix in (
        ("files", bad_files, n_files, "repair the files"),
        ("documents", bad_documents, n_all_documents, "repair the corpus, set data.text_field"),
    ):
        if found.total() > data.max_bad_share * n_all:
            raise ConfigError(
                f"{found.total()} of {n_all} {kind} cannot be read ({_listed(found)}), more than data.max_bad_share = "
                f"{data.max_bad_share}; first: {first(found)}; {fix}, or raise data.max_bad_share"
            )
    if not n_documents:
        why = f" ({_listed(reasons)}; first: {first(reasons)})" if reasons else ""
        raise ConfigError(f"the corpus has no text: there is no document in its {n_files} files{why}; give other files")
    for split in ("train", "validation"):
        if not sum(c[split]["documents"] for c in counts):
            raise ConfigError(f"none of the {n_documents} documents falls into the {split} split; give a larger corpus")


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())


def _merge_parts(data: DataConfig, counts: list[dict[str, Any]], folder: Folder, progress: Progress, shift: int) -> None:
    """Concatenates the parts to one token stream per split and writes problems.jsonl and, last, manifest.json."""
    tokenizer = vocabulary.load(folder / TOKENIZER, data.tokenizer.end_of_text)
    dtype = token_dtype(vocabulary.size(tokenizer))
    splits: dict[str, Any] = {}
    for done, split in enumerate(SPLITS):
        progress("joining the parts", done, len(SPLITS), split)
        paths = [_part_path(folder, i, f"{split}.bin") for i in range(len(counts))]
        sums = {key: sum(c[split][key] for c in counts) for key in ("tokens", "bytes", "documents")}
        splits[split] = sums | {"sha256": _concatenate(paths, folder / f"{split}.bin")}
    _concatenate([_part_path(folder, i, "problems") for i in range(len(counts))], folder / PROBLEMS)
    progress("joining the parts", len(SPLITS), len(SPLITS))
    content = {"tokenizer": vocabulary.digest(tokenizer), **{split: entry["sha256"] for split, entry in splits.items()}}
    manifest = Manifest(
        format=FORMAT,
        source=data.source if data.source == "python-stdlib" else " ".join(data.files) or str(data.dataset),
        split_rule=SPLIT_RULE
        + (f"; here the number is shifted by {shift}, so that there is a validation split" if shift else ""),
        vocab_tokens=vocabulary.size(tokenizer),
        end_of_text_id=vocabulary.end_of_text_id(tokenizer, data.tokenizer.end_of_text),
        dtype=dtype,
        tokenizer_digest=content["tokenizer"],
        splits=splits,
        problems=dict(sum((Counter(c["problems"]) for c in counts), Counter())),
        data_digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        end_of_text=data.tokenizer.end_of_text or vocabulary.END_OF_TEXT,
        notes=tuple(json.loads((folder / "parts" / NOTES).read_text())),
    )
    storage.write_atomic(folder / MANIFEST, manifest.to_json())
    for split, entry in splits.items():
        if isinstance(folder, Path):
            storage.remember_intact(folder / f"{split}.bin", entry["sha256"])


def token_dtype(vocab_tokens: int) -> Literal["<u2", "<u4"]:
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
