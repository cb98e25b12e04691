"""The process group of the workers of a Ray Train run. Called by worker_group, and by the functions that workers run.

Ray's TorchTrainer would make one too, but its controller, a process per run on the head, then imports torch: some 200 MB.
"""

import os
import socket
from datetime import timedelta

import ray.train
import ray.train.collective
import ray.util
from ray.train.backend import Backend, BackendConfig

TIMEOUT_SECONDS = 600.0  # how long a rank waits for another one in a collective


class _SharedGpus(Backend):
    """Every worker sees all GPUs of its node that the run has, as NCCL needs for direct copies between them."""

    share_cuda_visible_devices = True


class WorkerBackend(BackendConfig):
    """What Ray's controller sets up for the workers: nothing but the visible GPUs. They join each other themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Called by Ray Train."""
        return _SharedGpus


def join() -> None:
    """Makes the default process group of torch.distributed of all workers: nccl on GPUs, else gloo. Collective."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    context, device = ray.train.get_context(), get_device()
    address = ray.train.collective.broadcast_from_rank_zero(_free_address() if context.get_world_rank() == 0 else "")
    host, _, port = address.rpartition(":")
    # The names that torch and DeepSpeed read.
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))


def _free_address() -> str:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
