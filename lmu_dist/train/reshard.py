"""Reads one rank's part of a checkpoint's ZeRO shards, which any number of ranks wrote.

Comes in: the folder of the shards, local or at a URI, and the parameters of the engine that loads them. Goes out: the state
that this rank's ZeRO optimizer loads. A rank reads the byte ranges of its own partition, and nothing else of the tensors.
Called by train/engine. The layout is that of DeepSpeed 0.19, as its checkpoint/ds_to_universal.py reads it too:

- Stages 1 and 2: the parameters of a group are one flat tensor, padded to a multiple of 2 x ranks; rank r has its r-th part.
- Stage 3: each parameter is flattened and padded to a multiple of the ranks; rank r has the r-th part of each, and the parts of
  a sub-group lie one after the other in one flat tensor.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmu_dist import storage
from lmu_dist.config import Folder
from lmu_dist.train.checkpoint import CheckpointError

KNOWN_VERSIONS = "0.19."  # of DeepSpeed, whose shards have the layout above
ALIGNMENT = 2  # stages 1 and 2 pad a rank's part of a group to a multiple of this (nccl_start_alignment_factor)
# Keys in a shard: the state of the optimizer and the float32 weights. The index says whether it is of stage 3.
KEYS = (("base_optimizer_state", "single_partition_of_fp32_groups"), ("optimizer_state_dict", "fp32_flat_groups"))
FP32 = "fp32"  # our name of the float32 weights among the tensors of a shard; the others are exp_avg and exp_avg_sq
COUNTERS = ("global_steps", "global_samples", "skipped_steps")

# Shapes of the parameters by name, for every group (stages 1 and 2) or sub-group (3), in order.
Shapes = Sequence[Mapping[str, torch.Size]]


class EngineState(NamedTuple):
    """What one rank loads into its DeepSpeed engine."""

    optimizer: dict[str, Any]  # as the state_dict() of its ZeRO optimizer
    counters: dict[str, int]  # attributes of the engine
    buffers: dict[str, Tensor]  # of the model, by name


class Fragment(NamedTuple):
    """Consecutive elements of one parameter that a rank has."""

    name: str
    begin: int  # first element in the flattened parameter
    group: int  # index of the rank's flat tensor
    offset: int  # in the flat tensor
    numel: int


class Layout(NamedTuple):
    """How parameters are divided over ranks. Every rank has one flat tensor for each group."""

    shapes: Shapes
    stage3: bool
    world_size: int

    def flat_numel(self, group: int) -> int:
        """Elements of a rank's flat tensor, with its padding."""
        numels = [shape.numel() for shape in self.shapes[group].values()]
        if self.stage3:
            return sum(math.ceil(numel / self.world_size) for numel in numels)
        return ALIGNMENT * math.ceil(sum(numels) / (ALIGNMENT * self.world_size))

    def fragments(self, rank: int) -> list[Fragment]:
        """The elements of every parameter that a rank has, in the order of its flat tensors."""
        found = []
        for group, parameters in enumerate(self.shapes):
            share, offset = self.flat_numel(group), 0
            if not self.stage3:
                offset = -rank * share  # of the group's first element, relative to the rank's part
            for name, shape in parameters.items():
                numel = shape.numel()
                if self.stage3:
                    share = math.ceil(numel / self.world_size)
                    begin, end = min(rank * share, numel), min((rank + 1) * share, numel)
                    found.append(Fragment(name, begin, group, offset, end - begin))
                    offset += share
                else:
                    begin, end = max(-offset, 0), min(share - offset, numel)
                    found.append(Fragment(name, begin, group, offset + begin, end - begin))
                    offset += numel
        return [fragment for fragment in found if fragment.numel > 0]


class Copy(NamedTuple):
    """Consecutive elements that a rank copies from a shard to its own flat tensors."""

    shard: int  # rank that wrote the shard
    source: int  # index of the flat tensor in the shard
    source_offset: int
    target: int  # index of the own flat tensor
    target_offset: int
    numel: int


def copies(saved: Layout, own: Layout, rank: int) -> list[Copy]:
    """Where the elements of one rank of `own` are in the shards of `saved`."""
    holders: dict[str, list[tuple[int, Fragment]]] = {}
    for shard in range(saved.world_size):
        for fragment in saved.fragments(shard):
            holders.setdefault(fragment.name, []).append((shard, fragment))
    found = list[Copy]()
    for mine in own.fragments(rank):
        for shard, theirs in holders[mine.name]:
            begin = max(mine.begin, theirs.begin)
            numel = min(mine.begin + mine.numel, theirs.begin + theirs.numel) - begin
            if numel <= 0:
                continue
            copy = Copy(
                shard, theirs.group, theirs.offset + begin - theirs.begin, mine.group, mine.offset + begin - mine.begin, numel
            )
            if found and copy == _next_to(found[-1], numel):
                found[-1] = found[-1]._replace(numel=found[-1].numel + numel)
            else:
                found.append(copy)
    return found


def _next_to(copy: Copy, numel: int) -> Copy:
    """The copy of the elements that follow."""
    return copy._replace(
        source_offset=copy.source_offset + copy.numel, target_offset=copy.target_offset + copy.numel, numel=numel
    )


def read(folder: Folder, shapes: Shapes, rank: int, world_size: int) -> EngineState:
    """Reads what rank `rank` of `world_size` loads from the ZeRO shards in `folder`.

    `shapes` are the parameters of the loading engine. Raises CheckpointError if the shards have another layout than the one
    above, or are of other parameters.
    """
    names = {path.name for path in folder.iterdir()}
    [model_file] = names & {"mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"}
    model = _TorchFile(folder / model_file)
    saved = Layout(model.content["param_shapes"], model_file.startswith("zero"), model.content["dp_world_size"])
    _check_model(folder, model.content["ds_version"], saved.shapes, shapes)
    own = Layout(shapes, saved.stage3, world_size)
    plan = copies(saved, own, rank)
    # A rank that has no elements reads shard 0 too, for the settings of the optimizer.
    shards = {k: _Shard(folder, names, saved, k) for k in sorted({copy.shard for copy in plan} or {0})}

    group_of = {name: group for group, parameters in enumerate(saved.shapes) for name in parameters}
    sources = [group_of[next(iter(parameters))] for parameters in shapes]  # at stage 3 the sub-groups may have other limits
    described = next(iter(shards.values()))
    tensors = [
        {key: torch.zeros(own.flat_numel(target), dtype=t.dtype) for key, t in described.tensors[source].items()}
        for target, source in enumerate(sources)
    ]
    for k, shard in shards.items():
        wanted = [(key, copy) for copy in plan if copy.shard == k for key in tensors[copy.target]]
        parts = shard.file.read([(shard.tensors[c.source][key], c.source_offset, c.numel) for key, c in wanted])
        for (key, copy), part in zip(wanted, parts, strict=True):
            tensors[copy.target][key].narrow(0, copy.target_offset, copy.numel).copy_(part)

    buffers = {name: model.content["module"][name] for name in model.content["buffer_names"]}
    values = model.read([(t, 0, t.numel()) for t in buffers.values()])
    return EngineState(
        described.with_tensors(tensors, sources),
        {name: model.content[name] for name in COUNTERS},
        {name: value.view(t.shape) for (name, t), value in zip(buffers.items(), values, strict=True)},
    )


def _check_model(folder: Folder, version: str, saved: Shapes, shapes: Shapes) -> None:
    if not version.startswith(KNOWN_VERSIONS):
        raise CheckpointError(
            f"checkpoint {folder.parent} was written by DeepSpeed {version}, and only the layout of {KNOWN_VERSIONS}x is "
            "known; resume it with the version of lmu-dist that wrote it"
        )
    theirs, ours = ([*parameters.items()] for parameters in (_flatten(saved), _flatten(shapes)))
    if theirs != ours:
        names = [a[0] for a, b in zip(ours, theirs, strict=False) if a != b]
        which = f"{names[0]} is the first that differs" if names else f"it has {len(theirs)}, the model {len(ours)}"
        raise CheckpointError(
            f"checkpoint {folder.parent} has other parameters than the model ({which}); resume it with the configuration and "
            "the version of lmu-dist that wrote it"
        )


def _flatten(shapes: Shapes) -> dict[str, torch.Size]:
    return {name: shape for parameters in shapes for name, shape in parameters.items()}


class _TorchFile:
    """A file of torch.save. Its structure is read at once; its tensors are read in parts, when they are asked for."""

    def __init__(self, path: Folder) -> None:
        self.path = path
        # On the meta device torch.load reads no tensors; it notes where in the file they are.
        with storage.open_for_seeking(path) as file:
            self.content: dict[str, Any] = torch.load(file, map_location="meta", weights_only=False)

    def read(self, parts: Sequence[tuple[Tensor, int, int]]) -> list[Tensor]:
        """Reads parts of tensors, given by tensor, first element and number of elements of the flattened tensor."""
        ranges = []
        for tensor, begin, numel in parts:
            stored_at = tensor.untyped_storage()._checkpoint_offset  # first byte in the file
            assert stored_at is not None
            first = stored_at + (tensor.storage_offset() + begin) * tensor.itemsize
            ranges.append((first, first + numel * tensor.itemsize))
        contents = storage.read_ranges(self.path, ranges)
        return [
            torch.frombuffer(content, dtype=tensor.dtype) if content else torch.empty(0, dtype=tensor.dtype)
            for content, (tensor, _, _) in zip(contents, parts, strict=True)
        ]


class _Shard:
    """The optimizer file of one rank."""

    def __init__(self, folder: Folder, names: set[str], layout: Layout, rank: int) -> None:
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        [self.name] = names & {name, f"bf16_{name}"}
        self.file = _TorchFile(folder / self.name)
        self.content: dict[str, Any] = self.file.content["optimizer_state_dict"]
        self.optimizer_key, self.weights_key = KEYS[layout.stage3]
        self.optimizer: dict[str, Any] = self.content[self.optimizer_key]
        self.tensors: list[dict[str, Tensor]] = []  # for every group by key: the flat tensors
        self.scalars: list[dict[str, Any]] = []  # for every group by key: the rest of the optimizer's state
        for group, weights in enumerate(self.content[self.weights_key]):
            state = self.optimizer["state"][group]
            flat = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
            self.tensors.append({FP32: weights, **flat})
            self.scalars.append({key: self._scalar(value) for key, value in state.items() if key not in flat})
        self._check(folder, layout, rank)

    def _scalar(self, value: Any) -> Any:
        return self.file.read([(value, 0, 1)])[0][0] if isinstance(value, Tensor) else value

    def _check(self, folder: Folder, layout: Layout, rank: int) -> None:
        used = [0] * len(
            layout.shapes
        )  # elements of the flat tensors before the padding, with which stages 1 and 2 save no FP32
        for fragment in layout.fragments(rank):
            used[fragment.group] = fragment.offset + fragment.numel
        sizes = [{tensor.numel() for tensor in by_key.values()} for by_key in self.tensors]
        expected = [{layout.flat_numel(group), numel} for group, numel in enumerate(used)]
        paddings = self.content.get("param_alignment_paddings", ())  # between parameters; 0 unless a setting asks for it
        fits = len(sizes) == len(expected) and all(found <= known for found, known in zip(sizes, expected, strict=True))
        if not fits or any(any(padding) for padding in paddings):
            raise CheckpointError(
                f"checkpoint {folder.parent}: {self.name} has another layout than DeepSpeed {KNOWN_VERSIONS}x writes with the "
                "settings of lmu-dist; resume it with the version of lmu-dist that wrote it"
            )

    def with_tensors(self, tensors: list[dict[str, Tensor]], sources: list[int]) -> dict[str, Any]:
        """The content of a shard with these flat tensors; the rest of it is from this shard's groups `sources`."""
        state = {
            target: self.scalars[source] | {key: tensor for key, tensor in by_key.items() if key != FP32}
            for target, (by_key, source) in enumerate(zip(tensors, sources, strict=True))
        }
        settings = [
            group | {"params": [target for target, source in enumerate(sources) if source in group["params"]]}
            for group in self.optimizer["param_groups"]
        ]
        weights = [by_key[FP32] for by_key in tensors]
        return self.content | {self.optimizer_key: {"state": state, "param_groups": settings}, self.weights_key: weights}
