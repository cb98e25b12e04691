"""Training steps of one worker for the parts `steps` and `engine`: by the DeepSpeed engine, and by plain torch.

Set DS_ACCELERATOR before importing it, since it imports DeepSpeed: call `process_group` first.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from measure import DTYPES, available_bytes
from torch import Tensor

from lmu_dist.config import ClusterConfig, TrainConfig
from lmu_dist.data.batches import Batch
from lmu_dist.models import accounting
from lmu_dist.models.shape import Shape

PRECISIONS = {"fp32": DTYPES["float32"], "bf16": DTYPES["bfloat16"]}
MEMORY_SHARE = 0.75  # of the card's free memory that a step may take by plan


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, by NCCL on a GPU, else by gloo. Sets what DeepSpeed reads at import."""
    on_gpu = device.type == "cuda"
    os.environ |= {"DS_ACCELERATOR": "cuda" if on_gpu else "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    if on_gpu:
        torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl" if on_gpu else "gloo", f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def settings(
    shape: Shape, n_rows: int, precision: str, zero_stage: int, device: torch.device
) -> tuple[TrainConfig, ClusterConfig]:
    """The configuration of a run whose batch is one micro-batch of `n_rows` rows."""
    tokens = n_rows * shape.sequence_tokens
    train = TrainConfig(
        tokens=tokens,
        batch_tokens=tokens,
        sequence_tokens=shape.sequence_tokens,
        precision="bf16" if precision == "bf16" else "fp32",
        clip_norm=0,
        warmup_tokens=0,
    )
    return train, ClusterConfig(n_workers=1, zero_stage=zero_stage, gpus_per_worker=int(device.type == "cuda"))


def planned_bytes(shape: Shape, n_rows: int, precision: str, zero_stage: int, device: torch.device) -> float:
    """Peak memory of a worker as `lmu-dist plan` prints it."""
    return accounting.worker_bytes(shape, n_rows, *settings(shape, n_rows, precision, zero_stage, device))[zero_stage]


def fitting_rows(shape: Shape, precision: str, device: torch.device, most: int) -> int:
    """The largest power of two of rows, at most `most`, that needs MEMORY_SHARE of the free memory by plan; at least 1."""
    n_rows, limit = most, MEMORY_SHARE * available_bytes(device)
    while n_rows > 1 and planned_bytes(shape, n_rows, precision, 0, device) > limit:
        n_rows //= 2
    return n_rows


def random_batch(shape: Shape, n_rows: int, seed: int) -> Batch:
    """Rows of random tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tokens: Tensor = torch.randint(shape.vocab_tokens, (n_rows, shape.sequence_tokens + 1), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
