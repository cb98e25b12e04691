"""Functions that the ranks run in tests of a step of the engine: reads on the CPU, precision of sums, ways to save memory."""

import gc
import itertools
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from tasks import LENGTH, ROWS, TRAIN, VOCAB, batch, model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lmu_dist.config import ClusterConfig
from lmu_dist.data.batches import Batch
from lmu_dist.models import head
from lmu_dist.train.engine import Engine


class HostReads(TorchDispatchMode):
    """Records where the values of tensors are read on the CPU, which on a GPU waits for all queued work: "package: caller"."""

    def __init__(self) -> None:
        super().__init__()
        self.callers = list[str]()
        self._functions = _FunctionMode(self._record)

    def __enter__(self) -> "HostReads":
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator; `item` and its like are recorded."""
        if func is torch.ops.aten._local_scalar_dense.default:
            self._record()
        return func(*args, **(kwargs or {}))

    def _record(self) -> None:
        for frame in reversed(traceback.extract_stack()):
            if "/torch/optim/" in frame.filename:  # Adam's step count, which is on the CPU anyway
                return
            for package in ("deepspeed", "lmu_dist"):
                if f"/{package}/" in frame.filename:
                    self.callers.append(f"{package}: {frame.name}")
                    return


class _FunctionMode(TorchFunctionMode):
    """Sees what does not reach the dispatcher for a tensor on the CPU."""

    def __init__(self, record: Callable[[], None]) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self._record()
        return func(*args, **(kwargs or {}))


def host_reads(stages: list[int], precisions: list[str]) -> dict[tuple[int, str], Counter[str]]:
    """Reads of tensors on the CPU during a step of two micro-batches, by ZeRO stage and precision. The head works in blocks."""
    head.MAX_LOGITS = 10 * VOCAB
    compute_blocks = head._losses_and_gradients

    def only_forward(x: Tensor, weight: Tensor, targets: Tensor, dloss: Tensor | None, with_gradients: bool) -> Any:
        assert dloss is None, "the blocks were computed again: the head did not recognise equal weights"
        return compute_blocks(x, weight, targets, dloss, with_gradients)

    head._losses_and_gradients = only_forward
    results = {}
    for stage, precision in itertools.product(stages, precisions):
        engine = Engine(
            model(),
            replace(TRAIN, precision=precision),
            ClusterConfig(zero_stage=stage, micro_batch_rows=ROWS // 2),
            torch.device("cpu"),
        )
        engine.step(batch(0), 1e-3)
        with HostReads() as reads:
            engine.step(batch(1), 1e-3)
        results[stage, precision] = Counter(reads.callers)
        engine.close()
    return results


def host_reads_on_gpu() -> list[str]:
    """Warnings of torch about synchronizations in a step at ZeRO stage 1 in bf16 on a GPU, by the file that asks for them."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    train = replace(TRAIN, precision="bf16")
    engine = Engine(model(), train, ClusterConfig(zero_stage=1, micro_batch_rows=ROWS // 2, gpus_per_worker=1), device)
    steps = [batch(step).pinned() for step in range(3)]
    for step in steps[:2]:
        engine.step(step, 1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        engine.step(steps[2], 1e-3)
        torch.cuda.set_sync_debug_mode("default")
    return [w.filename for w in caught if "synchroniz" in str(w.message)]


class Scale(torch.nn.Module):
    """A model whose gradient for each of its four weights is the mean of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the weights times the inputs."""
        return inputs * self.weight.float().sum()


# Gradients of the micro-batches: one large number, and numbers that vanish if they are added to it in bf16, one by one.
SUMMANDS = [1024, *[3] * 63]


def sums_of_gradients() -> dict[tuple[int, str, str | None], float]:
    """The gradient of each weight after the micro-batches, by ZeRO stage, precision of the sums and offload."""
    rows = torch.tensor(SUMMANDS)[:, None].expand(-1, LENGTH)
    tokens = rows.numel() * dist.get_world_size()
    train = replace(TRAIN, precision="bf16", batch_tokens=tokens, clip_norm=0.0)
    cases = [(stage, "fp32", None) for stage in range(4)] + [
        (2, "bf16", None),
        (1, "fp32", "optimizer"),
        (3, "fp32", "optimizer"),
    ]
    gradients = {}
    for stage, precision, offload in cases:
        cluster = ClusterConfig(zero_stage=stage, micro_batch_rows=1, offload=offload)
        engine = Engine(Scale(), replace(train, gradient_precision=precision), cluster, torch.device("cpu"))  # pyright: ignore
        gradients[stage, precision, offload] = engine.step(Batch(rows, rows), 1e-3)[1] / 4**0.5
        engine.close()
    return gradients


def save_memory(stages: list[int]) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Losses and norms of three steps, by ZeRO stage and the way to save memory.

    Raises AssertionError if a closed engine holds memory.
    """
    rank, world_size, results = dist.get_rank(), dist.get_world_size(), {}
    ways = {"none": {}, "checkpointing": {"activation_checkpointing": True}, "offload": {"offload": "optimizer"}}
    weights_bytes = sum(4 * p.numel() for p in model().parameters())
    for stage, (way, settings) in itertools.product(stages, ways.items()):
        if way == "offload" and not stage:
            continue
        before = live_bytes()
        engine = Engine(model(), TRAIN, ClusterConfig(zero_stage=stage, micro_batch_rows=2, **settings), torch.device("cpu"))
        results[stage, way] = [engine.step(batch(step, rank, world_size), 1e-2) for step in range(3)]
        engine.close()
        if len(results) > 1:  # the first engine also fills caches
            deadline = time.monotonic() + 10
            while (held := live_bytes() - before) >= weights_bytes / 4 and time.monotonic() < deadline:
                time.sleep(0.05)  # a thread of gloo may hold the last tensor for a moment
            assert held < weights_bytes / 4, (stage, way, weights_bytes, held)
    return results


def live_bytes() -> int:
    """Bytes of all tensors of this process. A storage counts once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def imported_compilers(stages: list[int]) -> set[str]:
    """What engines import of torch's compiler besides what torch's own optimizers import."""
    for stage in stages:
        engine = Engine(model(), TRAIN, ClusterConfig(zero_stage=stage), torch.device("cpu"))
        engine.step(batch(0), 1e-2)
        engine.close()
    return {"torch._inductor.compile_fx", "functorch.compile"} & set(sys.modules)
