"""Counts the parameters, FLOPs and memory of a Shape without building the model. All counts in the project come from here.

Each family counts its own sublayers (models/family). This module adds norms, embeddings, the head and the memory of ZeRO. FLOPs
are those of the paper's form of the LMU, whichever form runs. Bytes and executed FLOPs are of the fused form, the default.
tests/models/test_accounting.py compares the counts with numel(), with torch's flop counter and with the tensors that autograd
saves. Legend: V vocabulary, n sequence length.
"""

from dataclasses import dataclass
from typing import Any

from lmu_dist.config import ClusterConfig, ConfigError, TrainConfig
from lmu_dist.models import norms
from lmu_dist.models.counting import bytes_of
from lmu_dist.models.counts import Flops, Parameters
from lmu_dist.models.family import n_params_with
from lmu_dist.models.head import MAX_LOGITS, block_logits
from lmu_dist.models.network import n_checkpoints
from lmu_dist.models.registry import family_of
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import non_embedding_params

OVERLAP_PARAMETERS = 100_000_000  # from which passes take longer than their launches; an estimate, not measured


@dataclass(frozen=True)
class ZeroMemory:
    """Memory in bytes of the worker that needs most: the model state, and temporary buffers of DeepSpeed and Adam."""

    weights_bytes: float
    gradients_bytes: float  # after the backward pass
    optimizer_bytes: float
    backward_buffers_bytes: float  # during the backward pass: gradients being reduced, gathered weights
    update_buffers_bytes: float  # during the update: copies of gradients, Adam's temporaries
    host_bytes: float = 0.0  # in the CPU's memory, if the optimizer is offloaded

    @property
    def state_bytes(self) -> float:
        """Bytes of weights, gradients and optimizer state."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    def peak_bytes(self, activation_bytes: float) -> float:
        """Peak memory of a step. Activations are freed before the update, so the two do not add up."""
        return self.state_bytes + max(activation_bytes + self.backward_buffers_bytes, self.update_buffers_bytes)


def parameters(shape: Shape) -> Parameters:
    """Exact number of trainable parameters of a Shape."""
    family = family_of(shape)
    return Parameters(
        non_embedding=non_embedding_params(family, shape),
        head=shape.vocab_tokens * shape.d_model,
        position=shape.sequence_tokens * shape.d_model if family.learned_positions else 0,
    )


def check_parameters(shape: Shape, n_built: int) -> None:
    """Raises ConfigError unless a model of a Shape has as many parameters as were counted."""
    if n_built != (counted := parameters(shape).total):
        raise ConfigError(
            f"family {shape.family}: the model has {n_built:,} parameters and {counted:,} were counted; options that change "
            "its size must be among its `widths` (docs/families.md)"
        )


def check_options(shape: Shape, options: Any) -> None:
    """Raises ConfigError if a family builds another number of parameters under its options than were counted for a Shape.

    The default counts know only the widths. Called when a run is planned; its worker counts the model itself.
    """
    family = family_of(shape)
    counted, built = family.n_params(shape), n_params_with(family, shape, options)
    if built != counted:
        check_parameters(shape, parameters(shape).total - counted + built)


def flops(shape: Shape) -> Flops:
    """Forward FLOPs per token for training sequences of n = shape.sequence_tokens."""
    family = family_of(shape)
    return Flops(
        matmul=family.matmul_flops(shape),
        fft=family.fft_flops(shape),
        head=2 * shape.vocab_tokens * shape.d_model,
        kaplan=2 * parameters(shape).non_embedding,
    )


def executed_flops(shape: Shape, n_rows: int, on_gpu: bool, activation_checkpointing: bool = False) -> float:
    """Training FLOPs per token that are executed for `n_rows` rows at once, which decide how long a step takes.

    `flops` counts the paper's form of every family, for fits. Here are the operations of the form that runs: convolutions of
    the LMU as matrix products on a GPU, the causal half of attention, and what the backward pass computes again; with
    `activation_checkpointing` that is the whole forward pass of the blocks.
    """
    forward, backward = family_of(shape).executed_flops(shape, n_rows, on_gpu)
    return forward * (2 if activation_checkpointing else 1) + backward + 3 * flops(shape).head


def activation_bytes(
    shape: Shape, n_rows: int, precision: str = "fp32", on_gpu: bool = False, checkpointing: bool = False
) -> float:
    """Bytes of activations saved between the forward and the backward pass of `n_rows` rows.

    If the head is computed in blocks, it saves its gradients and the logits of one block instead of all logits. With
    `checkpointing`, the inputs of all blocks are saved, and when the head's are freed, the activations of one block.
    """
    family = family_of(shape)
    n_norms = family.n_sublayers(shape) * family.residual + 1
    n_tokens = n_rows * shape.sequence_tokens
    width = bytes_of(precision)
    elements, float32_elements = norms.saved_elements(family.norm, shape.d_model, on_gpu)
    norm_bytes = width * elements + 4 * float32_elements  # of one norm and token
    head_inputs = width * shape.d_model + 4 * 3  # per token: input and log-sum-exp of the head, token ids
    logits = n_tokens * shape.vocab_tokens
    matrix, features = shape.vocab_tokens * shape.d_model, n_tokens * shape.d_model
    if logits <= MAX_LOGITS:
        head = 4 * logits
    elif on_gpu and precision == "bf16":  # a block's logits and the weight gradient need bf16 and float32 copies
        head = 8 * min(logits, block_logits(on_gpu)) + 6 * matrix + 2 * features
    else:
        head = 4 * (min(logits, block_logits(on_gpu)) + matrix + features)
    sublayers = family.activation_bytes(shape, n_rows, precision, on_gpu)
    if checkpointing:
        n_sublayers = family.n_sublayers(shape)
        n_parts = n_checkpoints(n_sublayers, shape.n_blocks)
        kept = n_tokens * (width * n_parts * shape.d_model + norm_bytes + head_inputs)
        return kept + max(head, sublayers / n_parts + (n_norms - 1) / n_parts * n_tokens * norm_bytes)
    return sublayers + n_tokens * (n_norms * norm_bytes + head_inputs) + head


def worker_bytes(shape: Shape, n_rows: int, train: TrainConfig, cluster: ClusterConfig) -> tuple[float, float, float, float]:
    """Peak memory of a worker at ZeRO stages 0 .. 3, for passes over `n_rows` rows.

    It is the GPU's memory, if there is one. Otherwise an offloaded optimizer saves nothing: it is in the same memory.
    """
    on_gpu = cluster.gpus_per_worker > 0
    activations = activation_bytes(shape, n_rows, train.precision, on_gpu, cluster.activation_checkpointing)

    def at(stage: int) -> float:
        return _worker_memory(shape, stage, train, cluster).peak_bytes(activations)

    return at(0), at(1), at(2), at(3)


def host_bytes(shape: Shape, train: TrainConfig, cluster: ClusterConfig) -> float:
    """Bytes that each GPU worker keeps in the CPU's memory at cluster.zero_stage: the optimizer, if it is offloaded."""
    return _worker_memory(shape, cluster.zero_stage, train, cluster).host_bytes


def _worker_memory(shape: Shape, stage: int, train: TrainConfig, cluster: ClusterConfig) -> ZeroMemory:
    on_gpu = cluster.gpus_per_worker > 0
    return zero_memory(
        shape,
        stage,
        cluster.n_workers,
        train.precision,
        train.float32_gradients,
        overlaps_communication(on_gpu, cluster.n_workers, parameters(shape).total),
        cluster.offload == "optimizer" and on_gpu,
    )


def bucket_size(n: int) -> int:
    """Size of DeepSpeed's reduce and prefetch buckets for a model of `n` parameters, in elements.

    One sixteenth of the model, because buckets use memory that ZeRO should save. At least 2^18 elements (a megabyte in fp32):
    below that the latency of a collective exceeds its transfer time. At most DeepSpeed's default.
    """
    return min(n, max(2**18, n // 16), 500_000_000)


def executed_stage(zero_stage: int, float32_gradients: bool) -> int:
    """The ZeRO stage that DeepSpeed runs: 2 instead of 1 if the gradients of bfloat16 weights are summed in float32.

    DeepSpeed 0.19 has another optimizer for that case at stage 1. It keeps the float32 gradients of the whole model on every
    worker, and its checkpoints cannot be loaded at stage 2. Stage 2 keeps a share of them.
    """
    return 2 if zero_stage == 1 and float32_gradients else zero_stage


def overlaps_communication(on_gpu: bool, n_workers: int, n_parameters: int) -> bool:
    """Whether gradients are reduced during the backward pass at ZeRO stages 1 and 2, which takes a second bucket.

    DeepSpeed then waits for the whole GPU after every micro-batch. In small models, whose passes are bound by the launches of
    kernels, the queue would run dry each time.
    """
    return on_gpu and n_workers > 1 and n_parameters >= OVERLAP_PARAMETERS


def largest_parameter(shape: Shape) -> int:
    """Elements of the largest weight tensor. DeepSpeed never splits a tensor in communication."""
    counts = parameters(shape)
    return max(counts.head, counts.position, family_of(shape).largest_tensor(shape))


def zero_memory(
    shape: Shape,
    zero_stage: int,
    n_workers: int,
    precision: str = "fp32",
    float32_gradients: bool = False,
    overlaps: bool = False,
    offload: bool = False,
) -> ZeroMemory:
    """Memory of a worker at a ZeRO stage (Rajbhandari et al. 2020, section 3), with the buffers of DeepSpeed 0.19.

    DeepSpeed keeps a float32 master copy of bf16 weights, and from stage 1 on also of float32 weights. `float32_gradients`:
    those of bf16 weights are summed in float32. `overlaps`: see `overlaps_communication`. `offload`: the optimizer is on the
    CPU. benchmarks/memory.py compares the results with the memory of real workers.
    """
    zero_stage = executed_stage(zero_stage, float32_gradients)
    total, largest = parameters(shape).total, largest_parameter(shape)
    share, bucket = total / n_workers, bucket_size(total)
    # A share can end within a tensor. The worker then keeps the whole tensor.
    whole_tensors = min(total, share + largest) if n_workers > 1 else total
    width = bytes_of(precision)
    master = 4 if precision != "fp32" or zero_stage >= 1 else 0
    reduced_width = 4 if float32_gradients else width  # of gradients while they are summed over workers
    # Gradients being reduced: the bucket, a copy of the bucket (or of a tensor larger than it), and the next tensor. If one
    # bucket takes all gradients, it is copied after the last one was added.
    reducing = width * bucket + (
        reduced_width * max(bucket, largest) + width * largest if bucket < total else reduced_width * bucket
    )
    # Adam needs the float32 gradients of its share, and as much memory again for the square root of the second moment.
    adam = 8 * (share if zero_stage else total)
    if zero_stage == 0:
        gradients = reduced_width * total
        backward = width * total if float32_gradients else 0  # torch keeps the bf16 gradients of a pass until the next one
        update = adam + backward - (gradients if reduced_width == 4 else 0)  # in fp32 the gradients are used without a copy
    elif zero_stage == 1:
        gradients, backward = width * total, width * bucket
        update = max(adam - gradients, width * max(whole_tensors, bucket))  # copies its share, then frees all gradients
    elif zero_stage == 2:
        gradients = 4 * share if float32_gradients else width * whole_tensors
        backward = reducing - (gradients if bucket == total else 0)  # a single bucket is reduced before any are kept
        update = max(0, adam - gradients)
    else:
        gradients = reduced_width * share
        # Weights in use, and prefetched weights: gathered in the order of the workers, then copied into their own order.
        backward = reducing + (reduced_width - width) * bucket + width * min(total, largest + 2 * (bucket + largest))
        update = adam + reduced_width * bucket  # the bucket stays allocated
    if overlaps and zero_stage in (1, 2):
        backward += width * bucket  # a second one fills while the first is reduced
    optimizer = (master + 8) * (share if zero_stage else total)
    host = 0.0
    if offload and zero_stage:
        # The CPU holds master weights, moments, and the gradients of its share in float32; it updates there.
        host, optimizer, update = optimizer + 4 * share, 0.0, 0.0
        if zero_stage == 3:
            gradients = 0.0
        else:
            backward += width * largest  # a buffer on the way to the CPU
    return ZeroMemory(
        weights_bytes=width * (share if zero_stage == 3 else total),
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        backward_buffers_bytes=backward,
        update_buffers_bytes=update,
        host_bytes=host,
    )
