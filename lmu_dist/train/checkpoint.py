"""Checkpoints: ZeRO shards, weights and meta.json in a folder, with manifests by which any damage is noticed.

Every rank writes its files into a folder of its own; they are merged into one (by Ray) and read from there. A
checkpoint is whole when the manifest of every rank is there and every file has the digest it names.
"""

import json
import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lmu_dist import storage
from lmu_dist.config import ConfigError, Folder

META, WEIGHTS = "meta.json", "model.safetensors"
NAME = re.compile(r"^step-(\d{8})-w\d+-([0-9a-f]+)$")


class CheckpointError(ConfigError):
    """A checkpoint that is incomplete or damaged; the message names the file."""


class TornError(CheckpointError):
    """A checkpoint that lacks something: its writer was killed before all of it was there, or is still at it."""


@dataclass(frozen=True)
class Meta:
    """Where a run stood. With the configuration and the data this is all that is needed to go on exactly.

    No random state is kept, since none is used: weights start from the seed, and the data of a step follow from its number.
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
    fork_step: int = 0  # where this run left the one it shares its trunk with
    val_losses: list[float] = field(default_factory=list)  # what the plateau rule knows
    train_loss_nats: float = 0.0
    mean_loss_nats: float | None = None  # running mean of the training loss, and its best, which the divergence rule compares
    best_mean_loss_nats: float = math.inf
    training_seconds: float = 0.0
    evaluation: dict[str, Any] | None = None  # the last EvalMetrics, so that a finished run need not evaluate again


def folder_name(step: int, world_size: int, attempt: str) -> str:
    """Name of a checkpoint; of its own for every attempt, so that no left-over of a killed one is merged into it."""
    return f"step-{step:08d}-w{world_size}-{attempt}"


def seal(folder: Path, meta: Meta, rank: int, weights: dict[str, Tensor]) -> None:
    """Adds weights and meta (rank 0) to the shards a rank has written in `folder`, and last the manifest of all of it."""
    if rank == 0:
        safetensors.torch.save_file(weights, folder / WEIGHTS)
        (folder / META).write_text(json.dumps(asdict(meta)))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = {str(p.relative_to(folder)): [p.stat().st_size, storage.digest(p)] for p in files}
    (folder / _manifest(rank)).write_text(json.dumps({"world_size": meta.world_size, "files": listing}))


def verify(folder: Folder, digests: bool = True) -> Meta:
    """Reads meta.json after checking every file of the checkpoint, its size and its digest. Raises CheckpointError."""
    rank, world_size = 0, 1
    while rank < world_size:
        manifest = _read_json(folder / _manifest(rank))
        world_size = manifest["world_size"]
        for name, (size, digest) in manifest["files"].items():
            path = folder / name
            try:
                found = path.stat().st_size
            except FileNotFoundError as e:  # any other error says nothing of the checkpoint, and ends the search
                raise TornError(f"checkpoint {folder} lacks {name}") from e
            if found < size:
                raise TornError(f"checkpoint {folder}: {name} is not whole")
            if found != size or (digests and storage.digest(path) != digest):
                raise CheckpointError(f"checkpoint {folder}: {name} is damaged")
        rank += 1
    return Meta(**_read_json(folder / META))


def loadable(meta: Meta, zero_stage: int) -> bool:
    """Whether workers at this ZeRO stage, however many, can load it: DeepSpeed converts stages 1 and 2, and no others, into
    each other.
    """
    return meta.zero_stage == zero_stage or {meta.zero_stage, zero_stage} == {1, 2}


def newest_fork(forks: Folder, before_step: int, zero_stage: int) -> tuple[Folder | None, Meta | None]:
    """The latest whole state of a trunk up to step `before_step` that can be loaded at this stage, damaged ones passed over."""
    for folder in _found(forks):
        if int(NAME.match(folder.name)[1]) > before_step:  # pyright: ignore[reportOptionalSubscript]
            continue
        with suppress(CheckpointError):
            meta = verify(folder)
            if loadable(meta, zero_stage):
                return folder, meta
    return None, None


def newest_intact(run_folder: Folder) -> tuple[Folder | None, Meta | None, list[str]]:
    """The latest checkpoint of a run that is whole, its meta, and what was passed over and why.

    (None, None, ...) for a run that has none yet, or none that was ever written to its end. Raises CheckpointError if there
    are some, none is whole and one is damaged: starting from nothing would throw away what a person might still rescue.
    """
    passed_over, damaged = list[str](), False
    for folder in _found(run_folder):
        try:
            return folder, verify(folder), passed_over
        except CheckpointError as e:
            passed_over.append(str(e))
            damaged = damaged or not isinstance(e, TornError)
    if damaged:
        raise CheckpointError(
            f"{passed_over[0]}, and no older checkpoint of the run is whole; restore it, or delete {run_folder} "
            "to start the run anew"
        )
    return None, None, passed_over


def prune(run_folder: Folder, keep: int) -> None:
    """Deletes checkpoints older than the `keep` newest whole ones. What is damaged but newer stays for a person to see."""
    whole = 0
    for folder in _found(run_folder):
        if whole >= keep:
            storage.remove(folder)
            continue
        with suppress(CheckpointError):
            verify(folder, digests=False)  # run after every checkpoint, which may be large
            whole += 1


def _found(run_folder: Folder) -> list[Folder]:
    """Folders of checkpoints, whole or not, newest first: by step, then by attempt, whose word is the time it began."""
    found = [(match.groups(), p) for p in run_folder.glob("step-*") if (match := NAME.match(p.name))]
    return [p for _, p in sorted(found, key=lambda pair: pair[0], reverse=True)]


def read_weights(folder: Folder) -> dict[str, Tensor]:
    """Weights of a checkpoint by parameter name, without unpickling anything."""
    return safetensors.torch.load((folder / WEIGHTS).read_bytes())


def _manifest(rank: int) -> str:
    return f"manifest-{rank:05d}.json"


def _read_json(path: Folder) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as e:
        raise TornError(f"checkpoint {path.parent} lacks {path.name}") from e
    except ValueError as e:
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} is damaged") from e
