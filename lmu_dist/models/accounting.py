"""The only counter: parameters, FLOPs and bytes of a Shape, without building it. Everything downstream reads, none recounts.

The families say what their sublayers cost (models/family); here norms, embeddings, the head and ZeRO are added. FLOPs are those
of the paper's form, whatever form runs; bytes are those of the fused form, which runs by default. Held to numel(), to torch's
flop counter and to what autograd keeps by tests/models/test_accounting.py. Legend: V vocabulary, n sequence length.
"""

from dataclasses import dataclass

from lmu_dist.models.counting import bytes_of
from lmu_dist.models.head import MAX_LOGITS
from lmu_dist.models.registry import family_of
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import non_embedding_params


@dataclass(frozen=True)
class Parameters:
    """Trainable parameters. `non_embedding` is N as in Kaplan et al. 2020; `with_head` adds the tied V x D matrix,
    which the head multiplies by (Porian et al. 2024); `total` adds learned positions too and equals numel()."""

    non_embedding: int
    head: int
    position: int

    @property
    def with_head(self) -> int:
        """N with the head."""
        return self.non_embedding + self.head

    @property
    def total(self) -> int:
        """All that is trained."""
        return self.with_head + self.position


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token; a multiply-add is 2, elementwise work is left out, as the field does.

    matmul  matrix products of the blocks, causal attention at its full n (as torch's counter has it)
    fft     the LMU's Fourier transforms: 5/2 m log2 m per real transform of m = 2n points, 6 per complex product. They
            stand for its convolutions however these are computed: a study must not depend on the hardware it ran on
    head    the product with the vocabulary
    kaplan  2N: the convention behind C = 6ND
    """

    matmul: float
    fft: float
    head: float
    kaplan: float

    @property
    def forward(self) -> float:
        """Everything one forward pass does for a token."""
        return self.matmul + self.fft + self.head

    @property
    def training(self) -> float:
        """Forward and backward, the backward at twice the forward."""
        return 3 * self.forward

    @property
    def training_kaplan(self) -> float:
        """6N."""
        return 3 * self.kaplan


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes on the worker that holds most: the model state, and what DeepSpeed and Adam need beside it for parts of a step."""

    weights_bytes: float
    gradients_bytes: float  # when backward has ended
    optimizer_bytes: float
    backward_buffers_bytes: float  # while there are activations: gradients on their way to others, weights of others
    update_buffers_bytes: float  # after that: copies of gradients, Adam's temporaries

    @property
    def state_bytes(self) -> float:
        """Weights, gradients and optimizer state."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    def peak_bytes(self, activation_bytes: float) -> float:
        """The most a step needs; what the update needs comes when activations are gone."""
        return self.state_bytes + max(activation_bytes + self.backward_buffers_bytes, self.update_buffers_bytes)


def parameters(shape: Shape) -> Parameters:
    """Trainable parameters of a Shape, exactly."""
    family = family_of(shape)
    return Parameters(
        non_embedding=non_embedding_params(family, shape),
        head=shape.vocab_tokens * shape.d_model,
        position=shape.sequence_tokens * shape.d_model if family.learned_positions else 0,
    )


def flops(shape: Shape) -> Flops:
    """Forward FLOPs per token of a training sequence of n tokens."""
    family = family_of(shape)
    return Flops(
        matmul=family.matmul_flops(shape),
        fft=family.fft_flops(shape),
        head=2 * shape.vocab_tokens * shape.d_model,
        kaplan=2 * parameters(shape).non_embedding,
    )


def activation_bytes(shape: Shape, n_rows: int, precision: str = "fp32", on_gpu: bool = False) -> float:
    """Bytes of activations kept between forward and backward of `n_rows` rows.

    A head in blocks keeps its own gradients, and has the logits of one block.
    """
    family = family_of(shape)
    n_norms = family.n_sublayers(shape) * family.residual + 1
    n_tokens = n_rows * shape.sequence_tokens
    own = (n_norms + 1) * shape.d_model  # inputs of the norms, and of the head
    single = 2 * n_norms + 3  # statistics of the norms, logarithms of the head's sums, token ids
    logits = n_tokens * shape.vocab_tokens
    head = logits if logits <= MAX_LOGITS else MAX_LOGITS + (shape.vocab_tokens + n_tokens) * shape.d_model
    sublayers = family.activation_bytes(shape, n_rows, precision, on_gpu)
    return sublayers + n_tokens * (bytes_of(precision) * own + 4 * single) + 4 * head


def bucket_parameters(n: int) -> int:
    """How many of a model's `n` parameters DeepSpeed reduces, or gathers ahead, at once.

    A sixteenth: buckets are memory that ZeRO is to save. Not less than a megabyte, below which a collective's latency weighs
    more than what it carries; not more than DeepSpeed's default.
    """
    return min(n, max(2**18, n // 16), 500_000_000)


def largest_parameter(shape: Shape) -> int:
    """Elements of the largest tensor of weights, which DeepSpeed moves whole."""
    counts = parameters(shape)
    return max(counts.head, counts.position, family_of(shape).largest_tensor(shape))


def zero_memory(shape: Shape, zero_stage: int, n_workers: int, precision: str = "fp32") -> ZeroMemory:
    """Weights, gradients and Adam's state on one of `n_workers` (Rajbhandari et al. 2020, section 3), and what DeepSpeed 0.19
    needs to move them; held to what workers really have by benchmarks/memory.py.

    DeepSpeed keeps a float32 master copy beside bf16 weights, and from stage 1 on beside float32 weights too.
    """
    total, largest = parameters(shape).total, largest_parameter(shape)
    share, bucket = total / n_workers, bucket_parameters(total)
    whole = min(total, share + largest) if n_workers > 1 else total  # a share ends within a tensor, and is kept to its end
    width = bytes_of(precision)
    master = 4 if precision != "fp32" or zero_stage >= 1 else 0
    # Gradients on their way: in the bucket; in a copy of it, or of a tensor that is larger; and the next tensor's. Where one
    # bucket takes them all, the copy is made when the last one is in it.
    reduced = bucket + max(bucket, largest) + largest if bucket < total else 2 * bucket
    # Adam works on float32 gradients of its share, and as much again for the root of its second moment.
    adam = 8 * (share if zero_stage else total)
    if zero_stage == 0:
        gradients, backward = width * total, 0
        update = adam - gradients if precision == "fp32" else adam  # in fp32 on the gradients themselves
    elif zero_stage == 1:
        gradients, backward = width * total, width * bucket
        update = max(adam - gradients, width * max(whole, bucket))  # a share of all gradients is copied; then they go
    elif zero_stage == 2:
        gradients = width * whole
        backward = width * reduced - (gradients if bucket == total else 0)  # none are kept before the only bucket is reduced
        update = max(0, adam - gradients)
    else:
        gradients = width * share
        # Weights in use, and those fetched ahead, first in the order of the workers and then in their own.
        backward = width * (reduced + min(total, largest + 2 * (bucket + largest)))
        update = adam + width * bucket  # beside buffers that stay
    return ZeroMemory(
        weights_bytes=width * (share if zero_stage == 3 else total),
        gradients_bytes=gradients,
        optimizer_bytes=(master + 8) * (share if zero_stage else total),
        backward_buffers_bytes=backward,
        update_buffers_bytes=update,
    )
