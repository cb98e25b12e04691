"""Runs the TokenizeTasks of a corpus in processes on this machine: tasks in; done bytes out, while the parts are written.

Called by data/prepare. launch/corpus has the other TaskRunner, for a cluster.
"""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from typing import Any

from lmu_dist import pools
from lmu_dist.config import FailedError
from lmu_dist.data import progress
from lmu_dist.data.tokenize_shard import TokenizeTask, tokenize

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
                done, _ = wait(running, progress.PROGRESS_SECONDS, FIRST_COMPLETED)
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
