"""Checkpoints: a folder with ZeRO shards, weights and meta.json, and a manifest of sha256 digests per rank.

Each rank writes its files to a local folder, and a thread uploads them to one folder in storage that all ranks share, the
manifest last. A checkpoint is intact when every rank's manifest exists and every listed file has the listed size and digests.
Ranks that resume check it together; commands that have no ranks check it in their own process.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lmu_dist import storage
from lmu_dist.config import ConfigError, Folder
from lmu_dist.records import known_fields

META = "meta.json"
MANIFEST = "manifest-"
SHARDS = "zero"  # DeepSpeed's folder inside a checkpoint
BLOCK_BYTES = 1 << 24  # files are hashed in blocks, so that ranks can share the work on a large file
NAME = re.compile(r"^step-(\d{8})-w\d+-([0-9a-f]+)$")


T = TypeVar("T")


class CheckpointError(ConfigError):
    """A checkpoint is incomplete or damaged. The message names the file."""


class IncompleteCheckpointError(CheckpointError):
    """A checkpoint lacks a file or the end of one: its writer was killed, or is still writing."""


@dataclass(frozen=True)
class Meta:
    """State of a run at a checkpoint (meta.json). With the configuration and the data it makes the resumed run exact.

    It holds no random state because training uses none: initial weights follow from the seed, and the batch of a step follows
    from the step number.
    """

    step: int  # optimizer steps done
    key: str  # of the run
    world_size: int
    zero_stage: int
    data_digest: str
    tokenizer_digest: str
    code_digest: str
    config: dict[str, Any]
    shape: dict[str, Any]
    family_version: str = ""  # "" and 0: by version 0.1
    train_version: int = 0
    fork_step: int = 0  # step of the branch point that this run started from; 0: it trained from the start
    val_losses: list[float] = field(default_factory=list)  # nats, one per evaluation; input of the plateau rule
    train_loss_nats: float = 0.0
    mean_loss_nats: float | None = None  # running mean of the training loss; the divergence rule compares it with its best
    best_mean_loss_nats: float = math.inf
    training_seconds: float = 0.0
    evaluation: dict[str, Any] | None = None  # the last EvalMetrics, so that resuming a finished run does not evaluate again


def meta_from_json(stored: dict[str, Any]) -> Meta:
    """Meta as any version stored it."""
    return Meta(**known_fields(Meta, stored))


def folder_name(step: int, world_size: int, attempt: str) -> str:
    """Folder name of a checkpoint. It contains the attempt, so that files left by a killed attempt are not merged into it."""
    return f"step-{step:08d}-w{world_size}-{attempt}"


class Ranks(NamedTuple):
    """The processes that check a checkpoint together; by default only this one."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]  # collective: returns what every rank gave, by rank

    def on_each(self, compute: Callable[[], T]) -> list[T]:
        """Calls `compute` on every rank and returns all results. A CheckpointError of any rank is raised on all of them."""
        try:
            mine = compute(), None
        except CheckpointError as e:
            mine = None, e
        everyone = self.gather(mine)
        for _, error in everyone:
            if error is not None:
                raise error
        return [result for result, _ in everyone]

    def on_first(self, compute: Callable[[], T]) -> T:
        """Calls `compute` on rank 0 and returns its result on every rank."""
        result: Any = self.on_each(lambda: compute() if self.rank == 0 else None)[0]
        return result


SINGLE_PROCESS = Ranks()


class Block(NamedTuple):
    """Consecutive bytes of a file that have one digest."""

    name: str  # of the file, relative to the checkpoint's folder
    file_bytes: int
    begin: int  # first byte
    end: int  # the byte after the last one
    sha256: str


def write_manifest(folder: Path, rank: int, world_size: int) -> None:
    """Completes a rank's part of a checkpoint with a manifest, which lists every file with its size in bytes and sha256.

    A file of more than one block has a list with the digest of every block.
    """
    listing: dict[str, tuple[int, str | list[str]]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digests = [storage.digest(path, begin, end) for begin, end in _block_limits(size, BLOCK_BYTES)]
        listing[str(path.relative_to(folder))] = size, digests if len(digests) > 1 else digests[0]
    manifest = {"world_size": world_size, "block_bytes": BLOCK_BYTES, "files": listing}
    (folder / manifest_name(rank)).write_text(json.dumps(manifest))


def upload(folder: Path, to: Folder) -> None:
    """Copies a rank's part of a checkpoint to storage, the manifest last."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in sorted(paths, key=lambda p: p.name.startswith(MANIFEST)):
        storage.upload_file(path, to / str(path.relative_to(folder)))


class Uploader:
    """Uploads this rank's part of checkpoints from a background thread, one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint-upload")
        self._running: Future[None] | None = None

    def start(self, folder: Path, to: Folder, rank: int, world_size: int) -> None:
        """Starts to write the manifest of `folder`, upload it and delete it. The upload before must have ended."""
        assert self._running is None

        def run() -> None:
            try:
                write_manifest(folder, rank, world_size)
                upload(folder, to)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        self._running = self._thread.submit(run)

    def raise_error(self) -> None:
        """Raises the error of the upload, if it has failed by now."""
        if self._running is not None and self._running.done():
            self._running.result()

    def wait(self) -> None:
        """Waits until the upload has ended. Raises its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def verify(folder: Folder, digests: bool = True, ranks: Ranks = SINGLE_PROCESS) -> Meta:
    """Returns meta.json after checking the size and sha256 of every file of a checkpoint. Raises CheckpointError.

    Every rank hashes about the same number of bytes. With `digests=False` only sizes are checked.
    """
    n_writers: int = ranks.on_first(lambda: _read_json(folder / manifest_name(0))["world_size"])
    mine = range(ranks.rank, n_writers, ranks.size)
    manifests = ranks.on_each(lambda: {writer: _read_json(folder / manifest_name(writer)) for writer in mine})
    by_writer = {writer: manifest for some in manifests for writer, manifest in some.items()}
    blocks = [block for writer in range(n_writers) for block in _blocks(by_writer[writer])]
    ranks.on_each(lambda: _check(folder, share_of(blocks, ranks.rank, ranks.size), digests))
    return ranks.on_first(lambda: meta_from_json(_read_json(folder / META)))


def share_of(blocks: list[Block], rank: int, world_size: int) -> list[Block]:
    """The blocks that one rank checks: consecutive ones, with about the same number of bytes for every rank."""
    begins = list(accumulate((block.end - block.begin for block in blocks), initial=0))
    total = max(begins.pop(), 1)
    return [b for b, begin in zip(blocks, begins, strict=True) if min(begin * world_size // total, world_size - 1) == rank]


def _check(folder: Folder, blocks: list[Block], digests: bool) -> None:
    known = None  # the file whose size is known to be right
    for block in blocks:
        path = folder / block.name
        if known != block.name:
            try:
                found = path.stat().st_size
            except FileNotFoundError as e:  # other errors say nothing about the checkpoint and must propagate
                raise IncompleteCheckpointError(f"checkpoint {folder} lacks {block.name}") from e
            if found < block.file_bytes:
                raise IncompleteCheckpointError(f"checkpoint {folder}: {block.name} is incomplete")
            if found != block.file_bytes:
                raise CheckpointError(f"checkpoint {folder}: {block.name} is damaged")
            known = block.name
        if digests and storage.digest(path, block.begin, block.end) != block.sha256:
            raise CheckpointError(f"checkpoint {folder}: {block.name} is damaged")


def _blocks(manifest: dict[str, Any]) -> list[Block]:
    """The blocks of all files of a manifest. An older manifest has one digest for every file."""
    found = []
    for name, (size, digests) in manifest["files"].items():
        sha256s = digests if isinstance(digests, list) else [digests]
        limits = _block_limits(size, manifest["block_bytes"] if len(sha256s) > 1 else size)
        if len(limits) != len(sha256s):
            raise CheckpointError(f"the manifest that lists {name} is damaged")
        found += [Block(name, size, begin, end, sha) for (begin, end), sha in zip(limits, sha256s, strict=True)]
    return found


def _block_limits(n_bytes: int, block_bytes: int) -> list[tuple[int, int]]:
    """First byte and end of every block of a file; an empty file has one block."""
    return [(begin, min(begin + block_bytes, n_bytes)) for begin in range(0, max(n_bytes, 1), max(block_bytes, 1))]


def is_loadable(meta: Meta, zero_stage: int) -> bool:
    """Whether workers at this ZeRO stage can load the checkpoint, on any number of workers.

    Stages 1 and 2 have the same layout of shards; other stages cannot read each other.
    """
    return meta.zero_stage == zero_stage or {meta.zero_stage, zero_stage} == {1, 2}


def newest_branch_point(
    branch_points: Folder,
    before_step: int,
    zero_stage: int,
    ranks: Ranks = SINGLE_PROCESS,
    is_usable: Callable[[Meta], bool] = lambda _: True,
) -> tuple[Folder | None, Meta | None]:
    """The latest intact branch point of a trunk at or before step `before_step` that this ZeRO stage can load.

    A branch point is a checkpoint of the trunk from which decay branches start. Damaged ones are skipped, and those
    that are not `is_usable`.
    """
    for folder in list_checkpoints(branch_points, ranks):
        if int(NAME.match(folder.name)[1]) > before_step:  # pyright: ignore[reportOptionalSubscript]
            continue
        with suppress(CheckpointError):
            meta = verify(folder, ranks=ranks)
            if is_loadable(meta, zero_stage) and is_usable(meta):
                return folder, meta
    return None, None


def newest_intact(run_folder: Folder, ranks: Ranks = SINGLE_PROCESS) -> tuple[Folder | None, Meta | None, list[str]]:
    """The latest intact checkpoint of a run, its meta, and one message per newer checkpoint that was skipped.

    Returns (None, None, messages) if the run has no checkpoint, or only incomplete ones. Raises CheckpointError if none is
    intact and at least one is damaged: training from scratch would overwrite what a person might still restore.
    """
    skipped, damaged = list[str](), False
    for folder in list_checkpoints(run_folder, ranks):
        try:
            return folder, verify(folder, ranks=ranks), skipped
        except CheckpointError as e:
            skipped.append(str(e))
            damaged = damaged or not isinstance(e, IncompleteCheckpointError)
    if damaged:
        raise CheckpointError(
            f"{skipped[0]}, and no older checkpoint of the run is intact; restore it, or delete {run_folder} "
            "to train the run from the start"
        )
    return None, None, skipped


def prune(run_folder: Folder, keep: int) -> None:
    """Deletes all checkpoints older than the `keep` newest intact ones. Newer damaged ones are kept for inspection."""
    n_intact = 0
    for folder in list_checkpoints(run_folder):
        if n_intact >= keep:
            storage.remove(folder)
            continue
        with suppress(CheckpointError):
            verify(folder, digests=False)  # runs after every save, and hashing may take long
            n_intact += 1


def list_checkpoints(run_folder: Folder, ranks: Ranks = SINGLE_PROCESS) -> list[Folder]:
    """Checkpoint folders, intact or not, newest first: by step, then by attempt, whose id is its start time in hex."""
    names = ranks.on_first(lambda: [path.name for path in run_folder.glob("step-*")])
    found = [(match.groups(), name) for name in names if (match := NAME.match(name))]
    return [run_folder / name for _, name in sorted(found, reverse=True)]


def download_shared_shards(folder: Folder, to: Path) -> None:
    """Downloads what ranks at stage 0 load, from a checkpoint at a URI: the files in SHARDS that do not belong to one rank."""
    for path in sorted((folder / SHARDS).iterdir()):
        if "zero_pp_rank_" not in path.name:
            storage.download_file(path, to / SHARDS / path.name)


def manifest_name(rank: int) -> str:
    """The name of the manifest of a rank."""
    return f"{MANIFEST}{rank:05d}.json"


def _read_json(path: Folder) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as e:
        raise IncompleteCheckpointError(f"checkpoint {path.parent} lacks {path.name}") from e
    except ValueError as e:
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} is damaged") from e
