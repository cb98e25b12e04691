"""Collective operations of the ranks other than training: broadcasts, waits and checks. Called by worker and start_point."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lmu_dist.config import ConfigError
from lmu_dist.train import checkpoint

PATIENCE_SECONDS = 6 * 3600.0  # how long ranks wait for the upload of another rank's part of a checkpoint


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """The process group in which ranks wait for what may take long: uploads, and the next run group. Collective."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_SECONDS))
    assert isinstance(group, dist.ProcessGroup)
    return group


def all_ranks() -> checkpoint.Ranks:
    """All workers, which check checkpoints together."""

    def gather(mine: Any) -> list[Any]:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return everyone

    return checkpoint.Ranks(dist.get_rank(), dist.get_world_size(), gather)


def broadcast_from_rank0(compute: Callable[[], Any], rank: int, group: dist.ProcessGroup | None = None) -> Any:
    """Calls `compute` on rank 0 and returns its result on every rank. A ConfigError is raised on every rank, so that none waits
    forever for another.
    """
    result_and_error: list[Any] = [None, None]
    if rank == 0:
        try:
            result_and_error[0] = compute()
        except ConfigError as e:
            result_and_error[1] = str(e)
    dist.broadcast_object_list(result_and_error, group=group)
    if result_and_error[1] is not None:
        raise ConfigError(result_and_error[1])
    return result_and_error[0]
