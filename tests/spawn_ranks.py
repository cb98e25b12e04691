"""Runs a function on several ranks with a gloo process group, for tests of collective code without Ray."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _run_rank(rank: int, world_size: int, folder: str, backend: str, task: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"DS_ACCELERATOR": "cuda" if backend == "nccl" else "cpu", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
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
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_rank, (world_size, folder, backend, task, arguments), nprocs=world_size)
        return torch.load(Path(folder) / "result", weights_only=False)
