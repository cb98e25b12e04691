"""Corpus preparation: a DataConfig in; one memory-mapped token stream per split, tokenizer.json and manifest.json out.

This file has the order of the steps: list the shards (data/sources), divide them for the work (data/divide), make the tokenizer
(data/tokenizer), tokenize each shard to part files of its own, on any machine (data/tokenize_shard), then check the parts and
join them in a fixed order (data/merge). All files are written atomically. Preparing can be killed and restarted at any point;
the result is the same byte for byte. Called by launch/corpus.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lmu_dist import storage
from lmu_dist.config import ConfigError, DataConfig, FailedError, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.corpus import Corpus, open_corpus
from lmu_dist.data.divide import split_shards
from lmu_dist.data.documents import CorpusShard, Document
from lmu_dist.data.manifest import MANIFEST, TOKENIZER, Location, locate, remember_folder
from lmu_dist.data.merge import DamagedPartsError, check_counts, merge_parts
from lmu_dist.data.progress import Progress, regularly
from lmu_dist.data.sources import count_archives, read
from lmu_dist.data.splits import split_of_document, split_shift
from lmu_dist.data.streams import is_full_disk
from lmu_dist.data.task_runner import TaskRunner, run_in_processes
from lmu_dist.data.tokenize_shard import PART_FORMAT, TokenizeTask, part_path, read_counts

LAYOUT = "layout"  # file in the folder `parts`: digest of the shards that the parts belong to
NOTES = "notes"  # file in the folder `parts`: the notes of the tokenizer, and the sha256 of tokenizer.json
TOKENIZER_TRAINING_BYTES = 64_000_000  # text that a BPE tokenizer is trained on, taken evenly from all shards


def prepare(
    data: DataConfig,
    storage_folder: Folder,
    progress: Progress = lambda *_: None,
    run_tasks: TaskRunner = run_in_processes,
    location: Location | None = None,
) -> Corpus:
    """Prepares a corpus below `storage_folder` and opens it. If it is already prepared, only opens it.

    `location` is that of the corpus, if the caller knows it; else the source is listed here.

    Raises ConfigError if too much of the corpus cannot be read, if the tokenizer does not give text back, if a prepared file is
    damaged, or if another process is preparing it.
    """
    location = location or locate(data, storage_folder)
    folder = location.folder
    if not location.prepared or (folder / "parts").exists():
        assert location.shards is not None or location.prepared
        with _full_disk_as_error(folder):
            _prepare(data, location.shards or [], folder, progress, run_tasks)
    corpus = open_corpus(folder, progress)
    if location.shards is not None:
        with suppress(OSError):  # the index only saves time
            remember_folder(data, storage_folder, location)
    return replace(corpus, notes=(*corpus.manifest.notes, *([location.note] if location.note else [])))


def _prepare(data: DataConfig, shards: list[CorpusShard], folder: Folder, progress: Progress, run_tasks: TaskRunner) -> None:
    state_dir = storage.local_state_dir(folder)
    storage.make_folder(state_dir)
    try:
        with FileLock(state_dir / "lock", timeout=0):
            if not (folder / MANIFEST).exists():
                parts = split_shards(shards, data, progress)
                _clean_up(parts, folder)
                shift = split_shift(data, parts)
                notes = _ensure_tokenizer(data, parts, folder, progress, shift)
                n_files, n_archives, remade = sum(len(s.paths) for s in shards), count_archives(shards), set[int]()
                while not (folder / MANIFEST).exists():
                    counts = _tokenize_missing(data, parts, folder, progress, run_tasks, shift)
                    try:
                        check_counts(data, n_files, n_archives, counts, folder)
                        merge_parts(data, counts, folder, progress, shift, notes)
                    except DamagedPartsError as e:  # perhaps by a power failure; they are made again, once
                        _discard(e.indices, folder, remade)
            storage.remove(folder / "parts")
    except (FileNotFoundError, FailedError):
        # For a URI the lock holds on this machine only: another machine may have finished the corpus and deleted the parts.
        if not (folder / MANIFEST).exists():
            raise
    except Timeout as e:
        raise ConfigError(f"{folder} is being prepared by another process; wait until it has finished, then start again") from e


def _discard(indices: set[int], folder: Folder, remade: set[int]) -> None:
    """Deletes damaged parts and adds them to `remade`. Raises FailedError if some are in there already."""
    if again := sorted(remade & indices):
        path = part_path(folder, again[0], "*")
        raise FailedError(f"preparing failed: {path} is damaged again after it was made anew; check the disk of {folder}")
    for index in indices:
        with suppress(FileNotFoundError):
            part_path(folder, index, "json").unlink()
    remade |= indices


def _clean_up(shards: list[CorpusShard], folder: Folder) -> None:
    """Deletes what an interrupted preparation left behind and cannot be used: unfinished parts, and what is of other shards
    or of a tokenizer that is damaged.

    Another version may divide the corpus otherwise. The parts, and the text that the tokenizer is trained on, depend on that.
    """
    parts = folder / "parts"
    layout = hashlib.sha256(repr((PART_FORMAT, shards)).encode()).hexdigest().encode()
    same_layout = (parts / LAYOUT).is_file() and (parts / LAYOUT).read_bytes() == layout
    if not same_layout or _tokenizer_notes(folder) is None:
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
        if not is_full_disk(e):
            raise
        raise FailedError(f"the disk is full while preparing {folder}; free some space, what is finished is kept") from e


def _ensure_tokenizer(
    data: DataConfig, shards: list[CorpusShard], folder: Folder, progress: Progress, shift: int
) -> tuple[str, ...]:
    """Writes tokenizer.json unless it exists, and returns the notes on the tokenizer.

    A BPE tokenizer is trained on training documents from all shards.
    """
    path, notes_path = folder / TOKENIZER, folder / "parts" / NOTES
    if (known := _tokenizer_notes(folder)) is not None:
        return known
    budget = TOKENIZER_TRAINING_BYTES // len(shards)
    total, done, phase = sum(s.size_bytes for s in shards), 0, "reading text"

    def texts() -> Iterator[str]:
        nonlocal done, phase
        finished = 0
        for shard in shards:
            used = 0
            for item in read(shard, data):
                if isinstance(item, Document) and split_of_document(item, data, shift) == "train":
                    yield item.text
                    used += len(item.text)
                    done = finished + int(shard.size_bytes * min(1.0, used / max(1, budget)))
                if used > budget:
                    break
            done = finished = finished + shard.size_bytes
        phase = "merging pairs"

    if data.tokenizer.kind == "bpe":
        with regularly(lambda: progress("training the tokenizer", done, total, phase)):
            tokenizer, notes = vocabulary.make(data.tokenizer, texts)
    else:
        tokenizer, notes = vocabulary.make(data.tokenizer, texts)
    content = tokenizer.to_str().encode()
    facts = {"notes": notes, "sha256": hashlib.sha256(content).hexdigest()}
    storage.write_atomic(notes_path, json.dumps(facts).encode())
    storage.write_atomic(path, content)
    return notes


def _tokenizer_notes(folder: Folder) -> tuple[str, ...] | None:
    """The notes on the tokenizer of an unfinished corpus; None if it is missing, or if it or the notes are damaged."""
    try:
        facts = json.loads((folder / "parts" / NOTES).read_bytes())
        return tuple(facts["notes"]) if storage.digest(folder / TOKENIZER) == facts["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tokenize_missing(
    data: DataConfig, shards: list[CorpusShard], folder: Folder, progress: Progress, run_tasks: TaskRunner, shift: int
) -> list[dict[str, Any]]:
    """Tokenizes every shard whose part does not exist yet. Returns the counts of all parts, in the order of the shards."""
    storage.make_folder(folder / "parts")
    listed = {path.name for path in (folder / "parts").glob("*.json")}
    all_counts = [read_counts(folder, i) if part_path(folder, i, "json").name in listed else None for i in range(len(shards))]
    tasks = (TokenizeTask(data, shard, i, folder, shift=shift) for i, shard in enumerate(shards))
    todo = [task for task in tasks if all_counts[task.index] is None]
    total = sum(s.size_bytes for s in shards)
    made_before = total - sum(task.shard.size_bytes for task in todo)
    if todo:
        with closing(run_tasks(todo)) as runner:
            for done, text in runner:
                progress("tokenizing", made_before + done, total, f"{text / 1e6:,.1f} MB of text" if text else "")
    result = list[dict[str, Any]]()
    for i, made_before_this in enumerate(all_counts):
        counts = made_before_this or read_counts(folder, i)
        if counts is None:
            raise FailedError(f"preparing failed: {part_path(folder, i, 'json')} cannot be read after it was written")
        result.append(counts)
    return result
