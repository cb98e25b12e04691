"""Runs a function on several ranks with a gloo process group, for tests of collective code without Ray."""

import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The ranks are forked from a server that has imported these, which takes a new process five seconds of a core.
multiprocessing.set_forkserver_preload(["deepspeed", "torch._dynamo", "lmu_dist.train.engine", "lmu_dist.models.lm"])


def _run_rank(rank: int, world_size: int, folder: str, backend: str, task: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"DS_ACCELERATOR": "cuda" if backend == "nccl" else "cpu", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    gc.freeze()  # searches for tensors need not visit the objects of the imports
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=world_size)
    result = task(*arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    dist.barrier()
    dist.destroy_process_group()
    # A normal exit while gloo's threads still run can, rarely, end with SIGABRT.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def spawn_ranks(world_size: int, task: Callable[..., Any], *arguments: Any, backend: str = "gloo") -> Any:
    """Runs `task(*arguments)` on `world_size` ranks and returns the result of rank 0. The task must be importable."""
    method = "spawn" if backend == "nccl" else "forkserver"  # CUDA does not work in a forked process
    with tempfile.TemporaryDirectory() as folder:
        run = (world_size, folder, backend, task, arguments)
        torch.multiprocessing.start_processes(_run_rank, run, nprocs=world_size, start_method=method)  # pyright: ignore[reportPrivateImportUsage]
        return torch.load(Path(folder) / "result", weights_only=False)
