"""DeepSpeed engine: a LanguageModel in; optimizer steps, losses and ZeRO-sharded checkpoints out.

The only module that imports DeepSpeed. It needs an initialized process group: workers and tests make one.
Built by launch/worker.
"""

import ctypes
import gc
import importlib
import math
import re
import resource
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from lmu_dist.array_types import Float
from lmu_dist.config import ClusterConfig, Folder, TrainConfig
from lmu_dist.data.batches import Batch
from lmu_dist.models.accounting import bucket_size, executed_stage, overlaps_communication
from lmu_dist.models.lm import LanguageModel
from lmu_dist.train import reshard
from lmu_dist.train.checkpoint import SHARDS, CheckpointError
from lmu_dist.train.optimizer import EagerAdamW, adam, parameter_groups

ZERO_SUPPORTED_OPTIMIZERS.append(EagerAdamW)  # DeepSpeed refuses types that it does not list; this one takes AdamW's steps
# The operators that can be compiled here: none. DeepSpeed looks only for the all-reduce of its inference on CPUs, which it
# would build in half a minute of two cores, with g++ and Python's headers. No setting of ours makes it compile another one.
deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]


class Engine:
    """A LanguageModel under ZeRO stage 0 to 3 with Adam, on this rank's device. Methods are collective: all ranks call them."""

    def __init__(self, model: LanguageModel, train: TrainConfig, cluster: ClusterConfig, device: torch.device) -> None:
        _import_muon()
        deepspeed.init_distributed(dist_backend=dist.get_backend())
        self.device = device
        self.batch_rows, largest_share = train.batch_rows, -(-train.batch_rows // dist.get_world_size())
        self.micro_rows = min(cluster.micro_batch_rows or largest_share, largest_share)
        self._n_micro = -(-largest_share // self.micro_rows)
        self.model = model.to(device)
        self.model.activation_checkpointing = cluster.activation_checkpointing
        self.model.reentrant_checkpoints = cluster.zero_stage == 3
        groups = parameter_groups(self.model, train)
        self._rate_factors = [group.rate_factor for group in groups]
        self._ds: Any
        self._optimizer: Any
        self._ds, self._optimizer, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=adam(groups, train),
            config={
                "train_micro_batch_size_per_gpu": self.micro_rows,
                "gradient_accumulation_steps": self._n_micro,
                "gradient_clipping": train.clip_norm,
                **_precision_settings(train, cluster),
                "zero_optimization": _zero_settings(self.model, train, cluster, device),
                "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also runs on offloaded state
                "steps_per_print": 2**31,
                "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice per micro-batch
            },
        )
        if cluster.zero_stage == 0 and train.precision == "bf16":
            # DeepSpeed creates Adam's state by a step with gradients of zero. It must not count in Adam's bias correction.
            for state in self._ds.basic_optimizer.state.values():
                state["step"].zero_()
            # DeepSpeed would read the gradients of each parameter, and a GPU would be waited for each time. The norm, which it
            # computes next, shows an overflow too.
            self._optimizer.overflow_checker.check = lambda *_: False
            if train.float32_gradients:  # the other stages have buffers of their own
                for parameter in self.model.parameters():
                    parameter.grad_dtype = torch.float32

    def step(self, batch: Batch, learning_rate: float) -> tuple[float, float]:
        """Takes one optimizer step on this rank's share of the global batch. Returns (mean loss in nats, gradient norm).

        The mean is over all rows of the global batch; shares may differ by one row. If the loss is not finite, the norm is NaN
        and the weights are damaged: close the engine. To keep the weights, the CPU would have to wait for the loss before it
        could queue the update. It waits once, at the end (and within DeepSpeed's update, see tests/train/test_engine.py).
        """
        for group, factor in zip(self._optimizer.param_groups, self._rate_factors, strict=True):
            group["lr"] = learning_rate * factor
        self._ds.train()
        result = torch.zeros(2, dtype=torch.float64, device=self.device)  # mean loss, gradient norm
        mean, n_ranks = result[0], dist.get_world_size()
        all_inputs, all_targets = (t.to(self.device, non_blocking=True) for t in (batch.inputs, batch.targets))
        micro_batches = zip(all_inputs.tensor_split(self._n_micro), all_targets.tensor_split(self._n_micro), strict=True)
        for i, (inputs, targets) in enumerate(micro_batches):
            if i:
                self._ds.step()  # ends the previous micro-batch; DeepSpeed updates weights after the last one only
            # DeepSpeed averages over micro-batches and ranks. The weight corrects for their different numbers of rows.
            weight = len(inputs) * self._n_micro * n_ranks / self.batch_rows
            if not weight:  # passes are collective, so a rank with no rows left runs one with weight 0
                inputs, targets = all_inputs[:1], all_targets[:1]
            losses = self._ds(inputs, targets)
            loss = losses.sum() / losses.numel() * weight  # not mean(): models/head needs the gradient of a sum
            self._ds.backward(loss)
            mean += loss.detach().double() / self._n_micro
        dist.all_reduce(mean)
        mean /= n_ranks
        unsharded_norm = self._gradient_norm() if self._ds.zero_optimization_stage() == 0 else None
        self._ds.step()
        norm = self._ds.get_global_grad_norm() if unsharded_norm is None else unsharded_norm
        result[1] = norm
        loss, norm = result.tolist()
        return loss, norm if math.isfinite(loss) else math.nan

    def _gradient_norm(self) -> Tensor:
        """Norm of the averaged gradients. Used at stage 0, for which DeepSpeed reports none."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads) if grads else torch.tensor(math.nan)

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
        self._ds.save_checkpoint(str(folder), tag=SHARDS, save_latest=False)

    def load(self, folder: Folder) -> None:
        """Loads weights and optimizer state from the ZeRO shards of a checkpoint, which any number of ranks wrote.

        At stages 1 to 3 each rank reads its own part of them, also from a URI; at stage 0 `folder` must be local. Raises
        CheckpointError.
        """
        if self._ds.zero_optimization():
            self._load_shards(folder / SHARDS)
            return
        loaded, _ = self._ds.load_checkpoint(str(folder), tag=SHARDS)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found no checkpoint in {folder}")

    def _load_shards(self, folder: Folder) -> None:
        """Does what DeepSpeed's load_checkpoint does, which accepts shards of the same number of ranks only."""
        optimizer, rank, world_size = self._ds.optimizer, dist.get_rank(), dist.get_world_size()
        state = reshard.read(folder, self._ds._get_zero_param_shapes(), rank, world_size)
        of_ranks = [state.optimizer if r == rank else None for r in range(world_size)]
        stage3 = self._ds.zero_optimization_partition_weights()
        if stage3:
            optimizer.checkpoint_event_prologue()  # frees the weights that are gathered
        optimizer.load_state_dict(of_ranks, load_optimizer_states=True, load_from_fp32_weights=True)
        if stage3:
            optimizer.checkpoint_event_epilogue()
        else:
            optimizer.update_lp_params()  # the weights of the model, from the float32 weights of all ranks
        for name, value in state.counters.items():
            setattr(self._ds, name, value)
        buffers = dict(self.model.named_buffers())
        for name, buffer in state.buffers.items():
            buffers[name].copy_(buffer)

    def close(self) -> None:
        """Frees the engine's memory. Nothing else can be called afterwards."""
        self._ds.destroy()  # DeepSpeed's hooks would otherwise hold it until the process ends
        parameter_offload.FWD_MODULE_STACK.clear()  # at stage 3 it holds the model too
        # After some passes at stage 3, parameters survive all this. So they must not hold any memory, nor DeepSpeed's buffers.
        for parameter in self.model.parameters():
            parameter.grad, parameter.data = None, parameter.data.new_empty(0)
            vars(parameter).clear()
        if self._ds.zero_optimization():
            vars(self._ds.optimizer).clear()
        self._ds.basic_optimizer.state.clear()
        del self._ds, self._optimizer, self.model  # others may still refer to this object
        free_memory()

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights in forward and backward passes."""
        return next(self.model.parameters()).dtype

    def reset_peak(self) -> None:
        """Starts a new measurement of peak memory."""
        reset_peak_bytes(self.device)

    def peak_bytes(self) -> int:
        """Peak memory of this worker since the last reset, in bytes."""
        return peak_bytes(self.device)


@cache
def _import_muon() -> None:
    """Imports DeepSpeed's Muon, which its optimizers ask for to see that ours is another one.

    Its functions are left as they are. To compile them, torch would import Inductor: 0.7 s of a core, 47 MB in every worker.
    """
    original = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = original


def _precision_settings(train: TrainConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """DeepSpeed's settings for the precision of weights, and of the sums of gradients over micro-batches and ranks."""
    bf16: dict[str, Any] = {"enabled": train.precision == "bf16"}
    if train.precision == "bf16" and cluster.zero_stage:
        bf16["check_grad_overflow"] = False  # it reads all gradients and waits for the GPU; the norm shows an overflow too
    settings: dict[str, Any] = {"bf16": bf16}
    if train.float32_gradients:
        settings["communication_data_type"] = "fp32"
        if cluster.zero_stage:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _zero_settings(model: LanguageModel, train: TrainConfig, cluster: ClusterConfig, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's settings of ZeRO."""
    n_parameters = sum(p.numel() for p in model.parameters())
    bucket = bucket_size(n_parameters)
    settings: dict[str, Any] = {
        "stage": executed_stage(cluster.zero_stage, train.float32_gradients),
        # DeepSpeed's default buckets are larger than most of our models. At stage 3 its defaults also keep gathered weights
        # that will be used again, which all are in the backward pass. No stage would then save memory.
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_reuse_distance": bucket,
        "stage3_param_persistence_threshold": min(100_000, n_parameters // 100),
    }
    on_gpu = device.type == "cuda"
    if cluster.zero_stage in (1, 2):  # at stage 3 DeepSpeed does so by default
        settings["overlap_comm"] = overlaps_communication(on_gpu, dist.get_world_size(), n_parameters)
    if cluster.offload == "optimizer":
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return settings


def free_memory() -> None:
    """Frees unreachable objects, which DeepSpeed's engines leave in reference cycles, and memory that torch and malloc keep.

    Otherwise the peak memory of a small run would be that of the larger run before it.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PROCESS = Path("/proc/self")


def reset_peak_bytes(device: torch.device) -> None:
    """Starts a new measurement of peak memory. Without Linux's /proc, the peak of a CPU worker spans the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")  # proc_pid_clear_refs(5): resets the peak resident set


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak_bytes`, in bytes: of a GPU what torch allocated, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text()):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_peak(precision: str, device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """Measured FLOP/s of a (size x size) matrix product on this worker, the best of `repeats`: the denominator of MFU."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        size *= 8
    a = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    del a
    free_memory()
    return 2 * size**3 / best
