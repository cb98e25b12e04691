"""DeepSpeed engine: a LanguageModel in; optimizer steps, losses and ZeRO-sharded checkpoints out.

The only module that imports DeepSpeed. It needs an initialized process group: Ray makes it for workers, tests make their own.
Built by launch/worker.
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
from lmu_dist.models.accounting import bucket_size
from lmu_dist.models.lm import LanguageModel

TAG = "zero"  # DeepSpeed's folder inside a checkpoint


class Engine:
    """A LanguageModel under ZeRO stage 0 to 3 with Adam, on this rank's device. Methods are collective: all ranks call them."""

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
        bucket = bucket_size(n_parameters)
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
                    # DeepSpeed's default buckets are larger than most of our models. At stage 3 its defaults also keep gathered
                    # weights that will be used again, which all are in the backward pass. No stage would then save memory.
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
        """Takes one optimizer step on this rank's share of the global batch. Returns (mean loss in nats, gradient norm).

        The mean is over all rows of the global batch; shares may differ by one row. If the loss is not finite, no rank changes
        its weights and the norm is NaN.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._ds.train()
        total = torch.zeros((), dtype=torch.float64)
        n_ranks = dist.get_world_size()
        micro_batches = zip(batch.inputs.tensor_split(self._n_micro), batch.targets.tensor_split(self._n_micro), strict=True)
        for i, (inputs, targets) in enumerate(micro_batches):
            if i:
                self._ds.step()  # ends the previous micro-batch; DeepSpeed updates weights after the last one only
            # DeepSpeed averages over micro-batches and ranks. The weight corrects for their different numbers of rows.
            weight = len(inputs) * self._n_micro * n_ranks / self.batch_rows
            if not weight:  # passes are collective, so a rank with no rows left runs one with weight 0
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
        """Norm of the averaged gradients. Used at stage 0, for which DeepSpeed reports none."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else math.nan

    @torch.no_grad()
    def losses(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Loss of every target in nats on this rank's rows, without an update."""
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
        """All weights, on the CPU of rank 0; other ranks get an empty dict. ZeRO 3 gathers one parameter at a time."""
        gathered = {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._ds.zero_optimization_stage() == 3):
                if dist.get_rank() == 0:
                    gathered[name] = parameter.detach().cpu().clone()
        return gathered

    def save(self, folder: Path) -> None:
        """Writes this rank's ZeRO shards to `folder`."""
        self._ds.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path, universal: bool = False) -> None:
        """Loads weights and optimizer state from ZeRO shards of the same number of ranks.

        With `universal`, `folder` is a universal checkpoint made by `to_universal`, from any number of ranks.
        """
        self._ds._config.load_universal_checkpoint = universal  # set here, so that one engine can load both kinds
        loaded, _ = self._ds.load_checkpoint(str(folder), tag=TAG)
        if loaded is None:
            raise ValueError(f"DeepSpeed found no checkpoint in {folder}")

    def close(self) -> None:
        """Frees the engine's memory, which DeepSpeed's hooks would otherwise hold until the process ends."""
        self._ds.destroy()

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights in forward and backward passes."""
        return next(self.model.parameters()).dtype

    def peak_bytes(self) -> int:
        """Peak memory of this worker in bytes: of its GPU if it has one, else the process's resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def to_universal(folder: Path, to: Path) -> None:
    """Converts ZeRO shards (stage 1 to 3) to a DeepSpeed universal checkpoint, which any number of ranks can load.

    Raises ValueError if DeepSpeed's converter fails.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(folder / TAG), "--output_folder", str(to / TAG)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"DeepSpeed cannot convert {folder} for another number of workers: {lines[-1] if lines else ''}")


def _adam(model: LanguageModel, train: TrainConfig) -> torch.optim.Optimizer:
    """torch's AdamW, which is Adam when weight_decay is 0. Biases, norms and other vectors get no weight decay."""
    # foreach is torch's default on GPUs; on CPUs it saves one of two temporaries.
    settings = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.eps, "foreach": True}
    if not train.weight_decay:
        return torch.optim.AdamW(model.parameters(), weight_decay=0.0, **settings)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **settings)


def matmul_peak(precision: str, device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """Measured FLOP/s of a (size x size) matrix product on this worker, the best of `repeats`: the denominator of MFU."""
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
