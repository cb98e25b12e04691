"""The only counter: parameters, FLOPs and bytes of a Shape, without building it. Everything downstream reads, none recounts.

FLOPs are those of the paper's form, whatever form runs; bytes are those of the fused form, which runs unless told otherwise.
Held to numel(), to torch's flop counter and to what autograd keeps by tests/models/test_accounting.py. Legend: V vocabulary,
n sequence length.
"""

import math
from dataclasses import dataclass

from lmu_dist.models.mixers.lmu import legendre
from lmu_dist.models.shape import Shape

LOGITS = 2**23  # that exist at once: 32 MB (models/head)
LANES = 16  # a processor takes channels in so many (models/kernels/lanes.h)


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


def _sublayer_parameters(name: str, s: Shape) -> int:
    d, r = s.d_model, s.reduced_order
    match name:
        case "ffn":
            return 2 * d * s.d_ff + s.d_ff + d
        case "attention":
            return 4 * d * d + 4 * d
        case "lstm":
            return 4 * s.d_hidden * (d + s.d_hidden + 2 + 2 * (s.n_blocks - 1) * (s.d_hidden + 1)) + s.d_hidden * d + d
        case "lmu":
            return 3 * r * s.order + 3 * r + r
    raise AssertionError(name)


def _sublayer_matmul_flops(name: str, s: Shape) -> float:
    d, r = s.d_model, s.reduced_order
    match name:
        case "ffn":
            return 4 * d * s.d_ff
        case "attention":
            return 8 * d * d + 4 * s.sequence_tokens * d
        case "lstm":
            return 8 * s.d_hidden * (d + s.d_hidden + 2 * (s.n_blocks - 1) * s.d_hidden) + 2 * s.d_hidden * d
        case "lmu":
            # The folding L H is shared by the rows of a batch; it is charged to each, as in the paper's table.
            return 6 * r * s.order + 2 * d * r * r + 2 * r * r + 2 * d * r
    raise AssertionError(name)


def _sublayer_fft_flops(name: str, s: Shape) -> float:
    if name != "lmu":
        return 0.0
    k, d, m = 3 * s.reduced_order, s.d_model, 2 * s.sequence_tokens
    transforms = d + k + k * d
    return (transforms * 2.5 * m * math.log2(m) + 6 * k * d * (m / 2 + 1)) / s.sequence_tokens


def chunk_tokens(order: int, n_readings: int, width: int, length: int, n_rows: int) -> int:
    """Tokens C of a chunk with the fewest multiply-adds per token and channel of the LMU in chunks, forward and backward;
    `length` itself if one chunk is best (models/mixers/lmu/chunked)."""

    def cost(chunk: int) -> float:
        if chunk >= length:
            return 3 * n_readings * length
        products = 3 * n_readings * (chunk + order)
        memory = 2 * (order + order**2 / chunk)
        weights = 2 * n_readings * order**2 * chunk / (n_rows * length * width)
        return products + memory + weights

    return min([*(2**i for i in range(5, 9) if 2**i < length), length], key=cost)


def transform_points(length: int, order: int, theta_tokens: float) -> int:
    """Points of the Fourier transforms that convolve `length` tokens on a processor (models/mixers/lmu/fourier): a power of two,
    of which half holds the row, or the memory's span where that is shorter."""
    # The span is looked for only where it can be shorter than the row: it is never less than the window.
    reach = length if length <= theta_tokens else min(length, legendre.span(order, theta_tokens))
    return max(16, 2 ** math.ceil(math.log2(2 * reach)))


def _lmu_activations(s: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
    """Of a mixer, as `_sublayer_activations`: a processor keeps readings, a GPU makes them again from chunks' features."""
    n, k, d = s.sequence_tokens, 3 * s.reduced_order, s.d_model
    if not on_gpu:
        spectra = (k + k % 2) * transform_points(n, s.order, s.theta_tokens)  # of the kernels, complex
        width = d + -d % LANES
        return k * width, width + spectra / (n * n_rows)
    chunk = chunk_tokens(s.order, k, d, n, n_rows)
    features = chunk + 1 + (s.order if chunk < n else 0)
    return (d * -(-n // chunk) + chunk * k / n_rows) * features / n, 0  # of all chunks, and the weights that read them


def _sublayer_activations(name: str, s: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
    """Numbers per token kept for the backward pass: in the model's precision, and in float32 whatever it is."""
    d = s.d_model
    match name:
        case "ffn":
            return d + 2 * s.d_ff, 0
        case "attention":
            return 5 * d + s.n_heads, 0
        case "lstm":
            return d + s.d_hidden + 17 * s.d_hidden * s.n_blocks, 0  # 16 of them the workspace of oneDNN
        case "lmu":
            return _lmu_activations(s, n_rows, on_gpu)
    raise AssertionError(name)


def activation_bytes(shape: Shape, n_rows: int, precision: str = "fp32", on_gpu: bool = False) -> float:
    """Bytes of activations kept between forward and backward of `n_rows` rows; a head in blocks keeps its own
    gradients, and has the logits of one block."""
    width = 4 if precision == "fp32" else 2
    n_norms = len(shape.sublayers) * shape.skips + 1
    each = (_sublayer_activations(name, shape, n_rows, on_gpu) for name in shape.sublayers)
    own, single = (sum(n) for n in zip(*each, strict=True))
    own += (n_norms + 1) * shape.d_model  # inputs of the norms, and of the head
    single += 2 * n_norms + 3  # statistics of the norms, logarithms of the head's sums, token ids
    n_tokens = n_rows * shape.sequence_tokens
    logits = n_tokens * shape.vocab_tokens
    head = logits if logits <= LOGITS else LOGITS + (shape.vocab_tokens + n_tokens) * shape.d_model
    return n_tokens * (width * own + 4 * single) + 4 * head


def parameters(shape: Shape) -> Parameters:
    """Trainable parameters of a Shape, exactly."""
    names = shape.sublayers
    norms = 2 * shape.d_model * (len(names) * shape.skips + 1)
    return Parameters(
        non_embedding=norms + sum(_sublayer_parameters(name, shape) for name in names),
        head=shape.vocab_tokens * shape.d_model,
        position=shape.sequence_tokens * shape.d_model if shape.learned_positions else 0,
    )


def flops(shape: Shape) -> Flops:
    """Forward FLOPs per token of a training sequence of n tokens."""
    return Flops(
        matmul=sum(_sublayer_matmul_flops(name, shape) for name in shape.sublayers),
        fft=sum(_sublayer_fft_flops(name, shape) for name in shape.sublayers),
        head=2 * shape.vocab_tokens * shape.d_model,
        kaplan=2 * parameters(shape).non_embedding,
    )


def bucket_parameters(n: int) -> int:
    """How many of a model's `n` parameters DeepSpeed reduces, or gathers ahead, at once.

    A sixteenth: buckets are memory that ZeRO is to save. Not less than a megabyte, below which a collective's latency weighs
    more than what it carries; not more than DeepSpeed's default.
    """
    return min(n, max(2**18, n // 16), 500_000_000)


def largest_parameter(s: Shape) -> int:
    """Elements of the largest tensor of weights, which DeepSpeed moves whole."""
    sizes = {
        "ffn": s.d_model * s.d_ff,
        "attention": 3 * s.d_model**2,
        "lstm": 4 * s.d_hidden * max(s.d_model, s.d_hidden),
        "lmu": 3 * s.reduced_order * s.order,
    }
    counts = parameters(s)
    return max(counts.head, counts.position, *(sizes[name] for name in s.sublayers))


def zero_memory(shape: Shape, zero_stage: int, n_workers: int, precision: str = "fp32") -> ZeroMemory:
    """Weights, gradients and Adam's state on one of `n_workers` (Rajbhandari et al. 2020, section 3), and what DeepSpeed 0.19
    needs to move them; held to what workers really have by benchmarks/memory.py.

    DeepSpeed keeps a float32 master copy beside bf16 weights, and from stage 1 on beside float32 weights too.
    """
    total, largest = parameters(shape).total, largest_parameter(shape)
    share, bucket = total / n_workers, bucket_parameters(total)
    whole = min(total, share + largest) if n_workers > 1 else total  # a share ends within a tensor, and is kept to its end
    width = 4 if precision == "fp32" else 2
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
