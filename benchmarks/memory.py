"""Memory of a worker under ZeRO, measured and as `lmu-dist plan` estimates it: JSON on stdout, a table on stderr.

    DS_ACCELERATOR=cpu PYTHONPATH=tests python benchmarks/memory.py --workers 1 2 4 --n-params 1e6

For each stage, number of workers and precision, it reports the worker with the most memory: bytes of weights, gradients and
optimizer state, read from the engine's attributes after the backward pass and again before the update; and the peak of all live
tensors in a step. Batches are so small that activations hardly count. tests/train/test_memory.py uses a small model.
"""

import argparse
import gc
import itertools
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from spawn_ranks import spawn_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmu_dist.config import ClusterConfig, TrainConfig
from lmu_dist.data.batches import Batch
from lmu_dist.models import accounting
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.sizing import shape_for
from lmu_dist.train.engine import Engine

STAGES = (0, 1, 2, 3)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16 gradients": {"precision": "bf16", "gradient_precision": "bf16"},
}
VOCAB, LENGTH = 61, 4
WARMUP_STEPS = 3  # the first step creates Adam's state, the second records what stage 3 prefetches
MEASURED_STEPS = 3  # the smallest peak counts, because gloo's threads sometimes free a bucket or two late


@dataclass(frozen=True)
class Row:
    """Memory of one worker in bytes, measured and planned."""

    zero_stage: int
    n_workers: int
    precision: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    peak: int  # of all tensors, including activations
    planned_weights: float
    planned_gradients: float
    planned_optimizer: float
    planned_peak: float  # as `plan` prints it: model state, buffers and activations

    @property
    def state_ratio(self) -> float:
        """Weights, gradients and optimizer state: measured / planned."""
        measured = self.weights + self.gradients + self.optimizer
        return measured / (self.planned_weights + self.planned_gradients + self.planned_optimizer)

    @property
    def peak_ratio(self) -> float:
        """Peak memory: measured / planned."""
        return self.peak / self.planned_peak


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all live tensors and their peak: the given tensors, and those that operators return."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = set[int]()
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts the tensors it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known or tensor.device.type == "meta":
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, storage: int, n_bytes: int) -> None:
        self._known.discard(storage)
        self.live -= n_bytes


def measure(stages: Sequence[int], precisions: Sequence[str], family: str, n_params: int) -> list[Row]:
    """Measures some stages and precisions on the workers of this process group. Collective."""
    n_workers = dist.get_world_size()
    shape = shape_for(family, n_params, vocab_tokens=VOCAB, sequence_tokens=LENGTH)
    tokens = n_workers * LENGTH
    train = TrainConfig(tokens=tokens, batch_tokens=tokens, sequence_tokens=LENGTH, warmup_tokens=0)
    rows = []
    for precision, stage in itertools.product(precisions, stages):
        unrelated = {_storage(t) for t in _tensors()}
        settings = replace(train, **PRECISIONS[precision])
        engine = Engine(LanguageModel(shape), settings, ClusterConfig(zero_stage=stage), torch.device("cpu"))
        planned = accounting.zero_memory(shape, stage, n_workers, settings.precision, settings.float32_gradients)
        found = _measure(engine, unrelated)
        rows.append(
            Row(
                zero_stage=stage,
                n_workers=n_workers,
                precision=precision,
                parameters=accounting.parameters(shape).total,
                **{name: int(engine.max_over_ranks(n_bytes)) for name, n_bytes in found.items()},
                planned_weights=planned.weights_bytes,
                planned_gradients=planned.gradients_bytes,
                planned_optimizer=planned.optimizer_bytes,
                planned_peak=planned.peak_bytes(accounting.activation_bytes(shape, 1, settings.precision)),
            )
        )
        engine.close()
    return rows


def _measure(engine: Engine, unrelated: set[int]) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state, and the peak, of this rank in a step, without `unrelated` storages."""
    ids = torch.arange(LENGTH + 1).remainder(VOCAB)[None]
    batch = Batch(ids[:, :-1], ids[:, 1:])
    for _ in range(WARMUP_STEPS):
        engine.step(batch, 1e-3)
    found: dict[str, int] = dict.fromkeys(("weights", "gradients", "optimizer"), 0)

    def measuring(method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, preceded by a measurement of the model state."""

        def measure_then_call(*args: Any, **kwargs: Any) -> Any:
            for name, n_bytes in _state(engine).items():
                found[name] = max(found[name], n_bytes)
            return method(*args, **kwargs)

        return measure_then_call

    ds = engine._ds
    ds.allreduce_gradients = measuring(ds.allreduce_gradients)  # called at the end of the backward pass
    ds.step = measuring(ds.step)
    peaks = []
    for _ in range(MEASURED_STEPS):
        gc.collect()
        with LiveTensors(t for t in _tensors() if _storage(t) not in unrelated) as live:
            engine.step(batch, 1e-3)
        peaks.append(live.peak)
    return found | {"peak": min(peaks)}


def _state(engine: Engine) -> dict[str, int]:
    """Bytes of weights, optimizer state and gradients that the engine holds now. A storage counts once, for its first kind."""
    zero, parameters = engine._optimizer, list(engine.model.parameters())
    adam = engine._ds.basic_optimizer
    masters = list(adam.state)
    names = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer")
    gradients = [getattr(zero, name, None) for name in names]
    # A subclass of list, which tree_leaves takes for a leaf.
    gradients.append([getattr(group, "flat_partition", None) for group in getattr(zero, "averaged_gradients", {}).values()])
    buckets = [getattr(bucket, "buffer", None) for bucket in getattr(zero, "ipg_buckets", {}).values()]
    seen = {_storage(t) for t in tree_leaves(buckets) if isinstance(t, torch.Tensor)}
    kinds = {
        "weights": [parameters, [getattr(p, "ds_tensor", None) for p in parameters]],
        "optimizer": [masters, list(adam.state.values())],
        "gradients": [[p.grad for p in parameters + masters], gradients],
    }
    held = {}
    for kind, roots in kinds.items():
        storages = {_storage(t): t.untyped_storage().nbytes() for t in tree_leaves(roots) if isinstance(t, torch.Tensor)}
        held[kind] = sum(n_bytes for storage, n_bytes in storages.items() if storage not in seen)
        seen |= storages.keys()
    return held


def _tensors() -> list[torch.Tensor]:
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def main() -> None:
    """Prints the JSON object on stdout and a table on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--n-params", type=float, default=1e6)
    parser.add_argument("--family", default="transformer")
    given = parser.parse_args()
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed's processes print to stdout
    rows = list[Row]()
    form = "{:>5} {:>7} {:>14} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7}"
    print("bytes per model parameter on the worker with the most memory; ratios: measured / planned", file=sys.stderr)
    names = ("stage", "workers", "precision", "weights", "gradients", "optimizer", "peak", "state", "peak")
    print(form.format(*names), file=sys.stderr)
    for n_workers in given.workers:
        for row in spawn_ranks(n_workers, measure, STAGES, tuple(PRECISIONS), given.family, int(given.n_params)):
            rows.append(row)
            each = [f"{n / row.parameters:.2f}" for n in (row.weights, row.gradients, row.optimizer, row.peak)]
            ratios = [f"{ratio:.3f}" for ratio in (row.state_ratio, row.peak_ratio)]
            print(form.format(row.zero_stage, n_workers, row.precision, *each, *ratios), file=sys.stderr, flush=True)
    out = [asdict(row) | {"state_ratio": row.state_ratio, "peak_ratio": row.peak_ratio} for row in rows]
    print(json.dumps({"family": given.family, "rows": out}, indent=1), file=result)


if __name__ == "__main__":
    main()
