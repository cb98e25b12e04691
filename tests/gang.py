"""Processes with a gloo group between them, for what is collective but needs no Ray."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _member(rank: int, world_size: int, folder: str, task: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    result = task(*arguments)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    dist.barrier()
    dist.destroy_process_group()
    # An interpreter that shuts down while gloo's threads still run ends, once in a long while, with SIGABRT.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def gang(world_size: int, task: Callable[..., Any], *arguments: Any) -> Any:
    """What `task(*arguments)` returned on rank 0, run on `world_size` ranks. The task must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_member, (world_size, folder, task, arguments), nprocs=world_size)
        return torch.load(Path(folder) / "result", weights_only=False)
