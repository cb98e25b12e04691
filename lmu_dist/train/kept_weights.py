"""The weights of a run that has ended, kept without the optimizer state: all that generate and export need of it.

They are in a folder WEIGHTS_ONLY of the run's folder, as a checkpoint without ZeRO shards. Training never starts from it. Needs
no torch. Called by launch/clean, train/export and the command line.
"""

import json
from contextlib import suppress
from typing import Any

from lmu_dist import storage
from lmu_dist.config import Folder
from lmu_dist.train.checkpoint import (
    META,
    CheckpointError,
    Meta,
    list_checkpoints,
    manifest_name,
    newest_intact,
    verify,
)

WEIGHTS_ONLY = "weights"


def newest_model(run_folder: Folder) -> tuple[Folder | None, Meta | None, list[str]]:
    """The newest intact checkpoint of a run, else the weights that were kept of it; its meta, and messages about skipped ones.

    Returns (None, None, messages) if there are neither. Raises CheckpointError if there are only damaged ones.
    """
    path, meta, skipped = newest_intact(run_folder)
    kept = run_folder / WEIGHTS_ONLY
    if path is None and (kept / manifest_name(0)).exists():
        return kept, verify(kept), skipped
    return path, meta, skipped


def keep_only_weights(run_folder: Folder) -> None:
    """Deletes the checkpoints of a run, after copying the weights of the newest one.

    Deletes nothing if no checkpoint has intact weights. If it is interrupted, a second call completes it.
    """
    checkpoints = list_checkpoints(run_folder)
    for checkpoint in checkpoints:
        with suppress(CheckpointError):
            verify(checkpoint, digests=False)
            _copy_weights(checkpoint, run_folder / WEIGHTS_ONLY)
            break
    else:
        storage.remove(run_folder / WEIGHTS_ONLY)
        return
    for checkpoint in checkpoints:
        storage.remove(checkpoint)


def weights_bytes(checkpoint: Folder) -> int:
    """The bytes of the files that `keep_only_weights` keeps of a checkpoint. Raises CheckpointError if it is incomplete."""
    verify(checkpoint, digests=False)
    return sum(size for size, _ in _kept_files(checkpoint)["files"].values())


def _kept_files(checkpoint: Folder) -> dict[str, Any]:
    """The manifest of rank 0, which writes the weights, without the files of DeepSpeed."""
    manifest = json.loads((checkpoint / manifest_name(0)).read_text())
    files = {name: entry for name, entry in manifest["files"].items() if name == META or name.endswith(".safetensors")}
    return manifest | {"world_size": 1, "files": files}


def _copy_weights(checkpoint: Folder, to: Folder) -> None:
    """Copies the weights and meta.json of a checkpoint, the manifest last. Raises CheckpointError if a copy is damaged."""
    manifest = _kept_files(checkpoint)
    storage.remove(to)
    for name in manifest["files"]:
        storage.copy_file(checkpoint / name, to / name)
    storage.write_atomic(to / manifest_name(0), json.dumps(manifest).encode())
    verify(to)
