"""The only file that knows DeepSpeed: a model in, optimizer steps, losses and ZeRO-sharded state out.

Needs a process group (Ray makes it for workers, tests make their own). Built by launch/worker.
"""

import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from lmu_dist.config import ClusterConfig, TrainConfig
from lmu_dist.data.batches import Batch
from lmu_dist.models.accounting import bucket_parameters
from lmu_dist.models.lm import LanguageModel

TAG = "zero"  # DeepSpeed's folder inside a checkpoint


class Engine:
    """A LanguageModel under ZeRO stage 0 to 3 with Adam, on this rank's device. All methods are collective."""

    def __init__(self, model: LanguageModel, train: TrainConfig, cluster: ClusterConfig, device: torch.device) -> None:
        deepspeed.init_distributed(dist_backend=dist.get_backend())
        self.device = device
        self.batch_rows, largest_share = train.batch_rows, -(-train.batch_rows // dist.get_world_size())
        self.micro_rows = min(cluster.micro_batch_rows or largest_share, largest_share)
        self._n_micro = -(-largest_share // self.micro_rows)
        self.model = model.to(device)
        self._ds: Any
        self._optimizer: Any
        n_parameters = sum(p.numel() for p in model.parameters())
        bucket = bucket_parameters(n_parameters)
        self._ds, self._optimizer, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=_adam(self.model, train),
            config={
                "train_micro_batch_size_per_gpu": self.micro_rows,
                "gradient_accumulation_steps": self._n_micro,
                "gradient_clipping": train.clip_norm,
                "bf16": {"enabled": train.precision == "bf16"},
                "zero_optimization": {
                    "stage": cluster.zero_stage,
                    # With DeepSpeed's defaults buckets are larger than most models, and weights that will be needed again,
                    # as all are in backward, stay whole at stage 3: no stage would save anything.
                    "reduce_bucket_size": bucket,
                    "stage3_prefetch_bucket_size": bucket,
                    "stage3_max_reuse_distance": bucket,
                    "stage3_param_persistence_threshold": min(100_000, n_parameters // 100),
                },
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
        )

    def step(self, batch: Batch, learning_rate: float) -> tuple[float, float]:
        """One optimizer step on this rank's share of the global batch: (mean loss over all rows in nats, gradient norm).

        Shares may differ by a row. A loss that is not finite leaves the weights as they were, on every rank.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._ds.train()
        total = torch.zeros((), dtype=torch.float64)
        n_ranks = dist.get_world_size()
        micro_batches = zip(batch.inputs.tensor_split(self._n_micro), batch.targets.tensor_split(self._n_micro), strict=True)
        for i, (inputs, targets) in enumerate(micro_batches):
            if i:
                self._ds.step()  # closes the micro-batch before; weights move after the last one only
            # DeepSpeed takes the mean over micro-batches and ranks; where they have not equally many rows these are weighed.
            weight = len(inputs) * self._n_micro * n_ranks / self.batch_rows
            if not weight:  # passes are collective: a rank with nothing left runs one that counts for nothing
                inputs, targets = batch.inputs[:1], batch.targets[:1]
            loss = self._ds(inputs.to(self.device), targets.to(self.device)).mean() * weight
            self._ds.backward(loss)
            total += loss.detach().double().cpu() / self._n_micro
        mean = self.sum_over_ranks(total) / n_ranks
        if not torch.isfinite(mean):
            return mean.item(), math.nan
        unsharded_norm = self._gradient_norm()
        self._ds.step()
        norm = self._ds.get_global_grad_norm()
        return mean.item(), float(unsharded_norm if norm is None else norm)

    def _gradient_norm(self) -> float:
        """Norm of the averaged gradients at stage 0, for which DeepSpeed reports none."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else math.nan

    @torch.no_grad()
    def losses(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Loss of every target in nats, on this rank's rows, weights untouched."""
        self._ds.eval()
        return self._ds(batch.inputs.to(self.device), batch.targets.to(self.device)).double().cpu()

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum of a CPU tensor over all ranks."""
        moved = x.to(self.device)
        dist.all_reduce(moved)
        return moved.cpu()

    def max_over_ranks(self, x: float) -> float:
        """Largest value of any rank."""
        moved = torch.tensor(float(x), dtype=torch.float64, device=self.device)
        dist.all_reduce(moved, dist.ReduceOp.MAX)
        return moved.item()

    def weights(self) -> dict[str, Tensor]:
        """All weights on the CPU of rank 0 (other ranks get an empty dict), gathered one at a time under ZeRO 3."""
        gathered = {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._ds.zero_optimization_stage() == 3):
                if dist.get_rank() == 0:
                    gathered[name] = parameter.detach().cpu().clone()
        return gathered

    def save(self, folder: Path) -> None:
        """Writes this rank's shards below `folder`."""
        self._ds.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path, universal: bool = False) -> None:
        """Takes weights and optimizer state from the shards of as many ranks, or from what `to_universal` made of others."""
        self._ds._config.load_universal_checkpoint = universal  # else an engine could load one of the two only
        loaded, _ = self._ds.load_checkpoint(str(folder), tag=TAG)
        if loaded is None:
            raise ValueError(f"DeepSpeed found no checkpoint in {folder}")

    def close(self) -> None:
        """Gives its memory back, which DeepSpeed's hooks would keep as long as the process lives."""
        self._ds.destroy()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights that passes work with."""
        return next(self.model.parameters()).dtype

    def peak_bytes(self) -> int:
        """Most memory this worker has held: of the GPU where there is one, else resident memory of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def to_universal(folder: Path, to: Path) -> None:
    """Makes from the shards of any number of ranks, at stage 1 to 3, a checkpoint that any other number can load."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(folder / TAG), "--output_folder", str(to / TAG)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"DeepSpeed cannot convert {folder} for another number of workers: {lines[-1] if lines else ''}")


def _adam(model: LanguageModel, train: TrainConfig) -> torch.optim.Optimizer:
    """torch's AdamW; with weight_decay 0 it is Adam. Biases, norms and other vectors never decay."""
    # Foreach is how torch does it on GPUs; on CPUs it saves one of two temporaries.
    settings = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.eps, "foreach": True}
    if not train.weight_decay:
        return torch.optim.AdamW(model.parameters(), weight_decay=0.0, **settings)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **settings)


def matmul_peak(precision: str, device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """Measured FLOP/s of this worker's best (size x size) matrix product: what a step's FLOP/s are a share of."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        size *= 8
    a = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        b = a @ a
        float(b[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
