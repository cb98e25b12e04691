"""Checkpoints: a folder with ZeRO shards, weights and meta.json, and a manifest of sha256 digests per rank.

Each rank writes its files to a folder of its own. Ray merges these into one folder, from which checkpoints are read. A
checkpoint is intact when every rank's manifest exists and every listed file has the listed size and digest.
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
from lmu_dist.records import known_fields

META, WEIGHTS = "meta.json", "model.safetensors"
NAME = re.compile(r"^step-(\d{8})-w\d+-([0-9a-f]+)$")


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


def write_manifest(folder: Path, meta: Meta, rank: int, weights: dict[str, Tensor]) -> None:
    """Completes a rank's part of a checkpoint: adds weights and meta.json (rank 0 only), then writes the rank's manifest.

    `folder` already holds the rank's ZeRO shards. The manifest lists every file with its size in bytes and sha256.
    """
    if rank == 0:
        safetensors.torch.save_file(weights, folder / WEIGHTS)
        (folder / META).write_text(json.dumps(asdict(meta)))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = {str(p.relative_to(folder)): [p.stat().st_size, storage.digest(p)] for p in files}
    (folder / _manifest_name(rank)).write_text(json.dumps({"world_size": meta.world_size, "files": listing}))


def verify(folder: Folder, digests: bool = True) -> Meta:
    """Returns meta.json after checking the size and sha256 of every file of a checkpoint. Raises CheckpointError.

    With `digests=False` only sizes are checked.
    """
    rank, world_size = 0, 1
    while rank < world_size:
        manifest = _read_json(folder / _manifest_name(rank))
        world_size = manifest["world_size"]
        for name, (size, digest) in manifest["files"].items():
            path = folder / name
            try:
                found = path.stat().st_size
            except FileNotFoundError as e:  # other errors say nothing about the checkpoint and must propagate
                raise IncompleteCheckpointError(f"checkpoint {folder} lacks {name}") from e
            if found < size:
                raise IncompleteCheckpointError(f"checkpoint {folder}: {name} is incomplete")
            if found != size or (digests and storage.digest(path) != digest):
                raise CheckpointError(f"checkpoint {folder}: {name} is damaged")
        rank += 1
    return meta_from_json(_read_json(folder / META))


def is_loadable(meta: Meta, zero_stage: int) -> bool:
    """Whether workers at this ZeRO stage can load the checkpoint, on any number of workers.

    DeepSpeed converts between stages 1 and 2, and between no others.
    """
    return meta.zero_stage == zero_stage or {meta.zero_stage, zero_stage} == {1, 2}


def newest_branch_point(branch_points: Folder, before_step: int, zero_stage: int) -> tuple[Folder | None, Meta | None]:
    """The latest intact branch point of a trunk at or before step `before_step` that this ZeRO stage can load.

    A branch point is a checkpoint of the trunk from which decay branches start. Damaged ones are skipped.
    """
    for folder in _list_checkpoints(branch_points):
        if int(NAME.match(folder.name)[1]) > before_step:  # pyright: ignore[reportOptionalSubscript]
            continue
        with suppress(CheckpointError):
            meta = verify(folder)
            if is_loadable(meta, zero_stage):
                return folder, meta
    return None, None


def newest_intact(run_folder: Folder) -> tuple[Folder | None, Meta | None, list[str]]:
    """The latest intact checkpoint of a run, its meta, and one message per newer checkpoint that was skipped.

    Returns (None, None, messages) if the run has no checkpoint, or only incomplete ones. Raises CheckpointError if none is
    intact and at least one is damaged: training from scratch would overwrite what a person might still restore.
    """
    skipped, damaged = list[str](), False
    for folder in _list_checkpoints(run_folder):
        try:
            return folder, verify(folder), skipped
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
    for folder in _list_checkpoints(run_folder):
        if n_intact >= keep:
            storage.remove(folder)
            continue
        with suppress(CheckpointError):
            verify(folder, digests=False)  # runs after every save, and hashing may take long
            n_intact += 1


def _list_checkpoints(run_folder: Folder) -> list[Folder]:
    """Checkpoint folders, intact or not, newest first: by step, then by attempt, whose id is its start time in hex."""
    found = [(match.groups(), p) for p in run_folder.glob("step-*") if (match := NAME.match(p.name))]
    return [p for _, p in sorted(found, key=lambda pair: pair[0], reverse=True)]


def read_weights(folder: Folder) -> dict[str, Tensor]:
    """Weights of a checkpoint by parameter name. Reads safetensors; nothing is unpickled."""
    return safetensors.torch.load((folder / WEIGHTS).read_bytes())


def _manifest_name(rank: int) -> str:
    return f"manifest-{rank:05d}.json"


def _read_json(path: Folder) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as e:
        raise IncompleteCheckpointError(f"checkpoint {path.parent} lacks {path.name}") from e
    except ValueError as e:
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} is damaged") from e
