"""Where the training of a cell starts: a Cell in; a checkpoint of its own, a branch point of its trunk, or step 0 out.

Called by worker, on every rank.
"""

import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray.util
import torch.distributed as dist

from lmu_dist import config as configuration
from lmu_dist.config import Folder
from lmu_dist.launch.cell import BRANCH_POINTS, Cell
from lmu_dist.launch.collectives import all_ranks
from lmu_dist.train import VERSION, checkpoint
from lmu_dist.train.checkpoint import Ranks
from lmu_dist.train.schedule import has_same_peaks


class StartPoint(NamedTuple):
    """Where the training of a cell starts: from a checkpoint of the cell, from a branch point of its trunk, or at step 0."""

    checkpoint_folder: Folder | None  # None: start at step 0
    is_own_checkpoint: bool  # of this cell, not of another cell of the trunk
    state: checkpoint.Meta
    attempt_id: str  # unique: no other attempt of any run has it


def find_start_point(cell: Cell) -> StartPoint:
    """The cell's newest intact checkpoint; else the latest usable branch point of its trunk; else step 0. Collective."""
    ranks, cluster = all_ranks(), cell.config.cluster
    attempt_id = ranks.on_first(lambda: f"{time.time_ns():x}")
    folder, state, _ = checkpoint.newest_intact(cell.folder, ranks)
    if state is not None:
        return StartPoint(folder, True, state, attempt_id)
    if cell.config.train.schedule == "wsd":
        folder, state = newest_branch_point(cell, cell.config.train.decay_start, ranks)
        if state is not None and state.key == cell.key:
            return StartPoint(folder, True, state, attempt_id)
        if state is not None:
            return StartPoint(folder, False, state_for_cell(state, cell, fork_step=state.step), attempt_id)
    manifest = cell.corpus.manifest
    fresh = checkpoint.Meta(
        step=0,
        key=cell.key,
        world_size=dist.get_world_size(),
        zero_stage=cluster.zero_stage,
        data_digest=manifest.data_digest,
        tokenizer_digest=manifest.tokenizer_digest,
        code_digest=cell.code_digest,
        family_version=cell.family_version,
        train_version=VERSION,
        config=configuration.to_dict(cell.config),
        shape=cell.shape.to_dict(),
    )
    return StartPoint(None, False, fresh, attempt_id)


def newest_branch_point(cell: Cell, before_step: int, ranks: Ranks) -> tuple[Folder | None, checkpoint.Meta | None]:
    """The latest branch point at or before a step from which a cell can start: its steps had the rates of the cell. Collective.

    Where the learning rate depends on the budgets of the ladder, cells of another list of budgets may have saved others.
    """

    def is_usable(meta: checkpoint.Meta) -> bool:
        train = cell.config.train
        if not train.rate_token_exponent:
            return True
        theirs = {key: meta.config["train"][key] for key in ("tokens", "decay_share", "earlier_tokens")}
        other = replace(train, **theirs | {"earlier_tokens": tuple(theirs["earlier_tokens"])})
        return has_same_peaks(train, other, meta.step)

    folder = cell.trunk_folder / BRANCH_POINTS
    return checkpoint.newest_branch_point(folder, before_step, cell.config.cluster.zero_stage, ranks, is_usable)


def state_for_cell(state: checkpoint.Meta, cell: Cell, fork_step: int) -> checkpoint.Meta:
    """The state of one cell of a trunk, changed into the state of another cell that branches off at `fork_step`."""
    return replace(state, key=cell.key, config=configuration.to_dict(cell.config), fork_step=fork_step)


def load(engine: Any, start: StartPoint) -> None:
    """Loads a checkpoint, of any number of workers. At stage 0 it is downloaded first, once per node."""
    folder = start.checkpoint_folder
    assert folder is not None
    if start.state.zero_stage > 0 or isinstance(folder, Path):
        engine.load(folder)
        return
    # Named by IP address, as Ray counts local ranks: workers at one address share a disk, and several nodes may share one too.
    name = f"lmu-dist-{start.attempt_id}-{ray.util.get_node_ip_address()}"
    local, is_first = Path(tempfile.gettempdir()) / name, os.environ["LOCAL_RANK"] == "0"
    try:
        if is_first:
            checkpoint.download_shared_shards(folder, local)
        dist.barrier()
        engine.load(local)
        dist.barrier()
    finally:
        if is_first:
            shutil.rmtree(local, ignore_errors=True)
