"""Ranks that check checkpoints together, as threads: many of them cost little."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmu_dist.train.checkpoint import CheckpointError, Ranks


def on_ranks(world_size: int, task: Callable[[Ranks], Any]) -> list[Any]:
    """Calls `task` on every rank and returns the results by rank. Raises the error of the first rank that has one."""
    barrier, given = threading.Barrier(world_size), [None] * world_size

    def run(rank: int) -> Any:
        def gather(mine: Any) -> list[Any]:
            given[rank] = mine
            barrier.wait()
            everyone = list(given)
            barrier.wait()  # until all have read
            return everyone

        try:
            return task(Ranks(rank, world_size, gather))
        except CheckpointError:
            raise  # all ranks raise it
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(world_size)]]
