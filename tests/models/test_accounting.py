"""Counts of every family against numel(), torch's flop counter and the tensors that autograd saves."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmu_dist.models import accounting
from lmu_dist.models.families.lmu import LMUOptions
from lmu_dist.models.family import Family
from lmu_dist.models.kernels import gated_delta_rule, ssd
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.mixers.lmu import chunked, fourier
from lmu_dist.models.registry import built_in, family_of, find, options_of
from lmu_dist.models.sizing import shape_for

# Models whose counts depend on keys of their families, besides those with default keys.
WITH_KEYS = (
    ("hybrid", 60_000, {"mixer": "mamba2"}),
    ("hybrid", 60_000, {"mixer": "lmu_modern"}),
    ("lmu_modern", 60_000, {"short_convolution": False, "output_gate": True}),
    ("lmu_modern", 60_000, {"output_gate": True, "qk_norm": True}),
)


@pytest.fixture(params=[*((f, n, {}) for f in built_in() for n in (3_000, 60_000)), *WITH_KEYS], ids=str)
def shape(request: pytest.FixtureRequest):
    family, n, keys = request.param
    return shape_for(family, n, vocab_tokens=97, sequence_tokens=40, options=options_of(find(family), keys))


def has_lmu(shape) -> bool:
    return any(width.split(".")[-1] == "order" for width in shape.widths)


def fused_options(shape):
    """Options with the fused form of the LMU, where there is one: on every device it saves what is counted."""
    options = family_of(shape).options_for_counting(shape)
    if shape.family == "hybrid" and has_lmu(shape):
        return replace(options, mixer_options=options.mixer_options | {"form": "fused"})
    return replace(options, form=None if shape.widths.get("qk_norm") else "fused") if has_lmu(shape) else None


def test_parameters_equal_numel(shape):
    counted, model = accounting.parameters(shape), LanguageModel(shape)
    by_name = {name: p.numel() for name, p in model.named_parameters()}
    assert counted.total == sum(by_name.values())
    assert counted.head == by_name.pop("embedding.weight")
    assert counted.position == by_name.pop("position.weight", 0)
    assert counted.non_embedding == sum(by_name.values())
    assert counted.with_head == counted.non_embedding + counted.head


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_matmul_flops_equal_torchs_counter(shape, monkeypatch):
    for kernel in (gated_delta_rule, ssd):  # the counter does not see C++
        monkeypatch.setattr(kernel, "is_available", lambda *_: False)
    model, counter = LanguageModel(shape, options=family_of(shape).options_for_counting(shape)), FlopCounterMode(display=False)
    tokens = torch.zeros(1, shape.sequence_tokens, dtype=torch.long)
    # The counter does not see the products of oneDNN's fused LSTM and of fused attention.
    plain_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), plain_attention, counter:
        model(tokens, tokens)
    counted = accounting.flops(shape)
    assert (counted.matmul + counted.head) * shape.sequence_tokens == counter.get_total_flops()


def test_hand_written_counts_equal_the_default_ones(shape):
    """A family with its own formulas gets the same counts as by the defaults of the base class."""
    family = family_of(shape)
    assert family.n_sublayers(shape) == Family.n_sublayers(family, shape)
    assert family.n_params(shape) == Family.n_params(family, shape)
    assert family.largest_tensor(shape) == Family.largest_tensor(family, shape)
    assert family.matmul_flops(shape) == Family.matmul_flops(family, shape)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_default_activation_bytes_are_an_upper_bound(precision):
    """The transformer saves the same on every device. The LSTM and the LMU save less than the meta device shows."""
    shape = shape_for("transformer", 60_000, vocab_tokens=97, sequence_tokens=40)
    family = family_of(shape)
    default = Family.activation_bytes(family, shape, 4, precision, False)
    assert 1 <= default / family.activation_bytes(shape, 4, precision, False) < 1.5


def test_training_flops_are_three_times_forward_flops(shape):
    counted = accounting.flops(shape)
    assert counted.training == 3 * (counted.matmul + counted.fft + counted.head)
    assert counted.training_kaplan == 6 * accounting.parameters(shape).non_embedding
    assert (counted.fft > 0) == has_lmu(shape)


def test_fft_flops_are_close_to_the_papers_table():
    """The paper's table counts a transform of x for each of Q, K and V and none of the kernels. We count the opposite."""
    shape = shape_for("lmu", 1_000_000, vocab_tokens=97, sequence_tokens=1024, options=LMUOptions(250, 25))
    d, q, r = shape.d_model, 250, 25
    table = 3 * d * (5 * (r + 1) * 11 + 6 * r) + 6 * q * r
    per_mixer = accounting.flops(shape).fft / shape.n_blocks + 6 * q * r
    assert per_mixer == pytest.approx(table, rel=0.05)


def test_zero_stage_shards_model_state():
    shape = shape_for("lmu", 60_000, vocab_tokens=97, sequence_tokens=40)
    total = accounting.parameters(shape).total
    memory = {stage: accounting.zero_memory(shape, stage, 4) for stage in range(4)}
    assert memory[0].state_bytes == 16 * total
    assert (memory[1].optimizer_bytes, memory[1].gradients_bytes) == (12 * total / 4, 4 * total)
    assert total < memory[2].gradients_bytes < 2.5 * total  # a quarter, up to the end of the last tensor
    assert (memory[3].gradients_bytes, memory[3].weights_bytes) == (total, total)
    assert accounting.zero_memory(shape, 0, 4, "bf16").state_bytes == 16 * total
    assert accounting.zero_memory(shape, 2, 1).state_bytes == 20 * total


def test_largest_parameter_equals_the_largest_tensor(shape):
    assert accounting.largest_parameter(shape) == max(p.numel() for p in LanguageModel(shape).parameters())


def test_peak_is_the_larger_of_backward_and_update():
    memory = accounting.zero_memory(shape_for("transformer", 100_000_000, vocab_tokens=97, sequence_tokens=40), 3, 64)
    assert memory.backward_buffers_bytes > memory.update_buffers_bytes
    assert memory.peak_bytes(1e9) == memory.state_bytes + memory.backward_buffers_bytes + 1e9
    one_worker = accounting.zero_memory(shape_for("transformer", 100_000_000, vocab_tokens=97, sequence_tokens=40), 1, 1)
    assert one_worker.peak_bytes(0) == one_worker.state_bytes + one_worker.update_buffers_bytes


def saved_bytes(shape, n_rows: int) -> int:
    """Bytes that autograd saves for the backward pass, without weights. Each storage counts once."""
    model = LanguageModel(shape, options=fused_options(shape))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def save(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    tokens = torch.zeros(n_rows, shape.sequence_tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        loss = model(tokens, tokens).mean()
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for t in saved.values())


def test_activation_bytes_equal_what_autograd_saves(shape):
    bound = 0.2 if shape.family == "lstm" else 0.1  # oneDNN pads the LSTM's workspace
    assert accounting.activation_bytes(shape, 4) == pytest.approx(saved_bytes(shape, 4), rel=bound)
    in_bf16 = accounting.activation_bytes(shape, 4, "bf16", on_gpu=True)
    assert in_bf16 < 0.8 * accounting.activation_bytes(shape, 4, on_gpu=True)


@pytest.mark.parametrize("n_rows", [1, 4])
@pytest.mark.parametrize(("n_params", "length"), [(100_000, 256), (1_000_000, 1024)])
def test_activation_bytes_on_gpu(n_params, length, n_rows, monkeypatch):
    """Runs the form of the GPU on the CPU."""
    config = chunked.chunked_config
    monkeypatch.setattr(fourier, "is_supported", lambda *_: False)
    monkeypatch.setattr(chunked, "chunked_config", lambda *args: config(*args)._replace(keep_preactivations=False))
    shape = shape_for("lmu", n_params, vocab_tokens=256, sequence_tokens=length)
    saved = saved_bytes(shape, n_rows)
    assert accounting.activation_bytes(shape, n_rows, on_gpu=True) == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize(
    ("order", "theta", "length", "width", "rows", "batch"),
    [(60, 128.0, 250, 20, 6, 4), (12, 20.0, 300, 5, 3, 2), (250, 256.0, 256, 8, 4, 2)],  # 32, 32 and 256 tokens a chunk
)
def test_executed_flops_of_the_gpu_form_equal_torchs_counter(order, theta, length, width, rows, batch, monkeypatch):
    """Runs the form of the GPU on the CPU. The counter sees all but the attention kernel."""
    monkeypatch.setattr(chunked, "use_sequential_scan", lambda _: False)
    rng = torch.Generator().manual_seed(0)
    sizes = [(batch, length, width), (3 * rows, order), (3 * rows,), (rows,)]
    x, projection, bias, p = (torch.randn(size, generator=rng, requires_grad=True) for size in sizes)
    config = chunked.chunked_config(x, 3 * rows, order, theta)
    config = config._replace(keep_preactivations=False, dtype=torch.bfloat16)
    chunked.fused_lmu(x, projection, bias, p, config)  # computes the powers of Abar that the scan needs
    with FlopCounterMode(display=False) as forward:
        out = chunked.fused_lmu(x, projection, bias, p, config)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    counted = chunked.multiply_adds(order, 3 * rows, width, length, batch, config.transition.chunk)
    seen = (forward.get_total_flops(), backward.get_total_flops())
    assert seen == pytest.approx([2 * batch * length * count for count in counted], rel=1e-12)


def test_executed_flops_add_what_the_backward_pass_computes_again(shape):
    """Activation checkpointing adds a forward pass of the blocks, which is all but the head."""
    n_rows, head = 4, accounting.flops(shape).head
    for on_gpu in (False, True):
        plain = accounting.executed_flops(shape, n_rows, on_gpu)
        forward, backward = family_of(shape).executed_flops(shape, n_rows, on_gpu)
        assert plain == pytest.approx(forward + backward + 3 * head)
        assert accounting.executed_flops(shape, n_rows, on_gpu, activation_checkpointing=True) == pytest.approx(plain + forward)
    counted = accounting.flops(shape)
    if not has_lmu(shape):
        assert 0.8 * counted.training < plain < 1.1 * counted.training  # chunked forms compute scores twice
    # A transform for every channel and kernel is most of the work in both counts.
    assert accounting.executed_flops(shape, n_rows, False) == pytest.approx(counted.training, rel=0.5)


def test_chunk_tokens_minimise_the_cost():
    """The paper's largest mixer. A row shorter than chunk plus memory is computed as one chunk without memory."""
    assert chunked.chunk_tokens(250, 75, 204, 1024, 2) == 32
    assert chunked.chunk_tokens(250, 75, 204, 256, 2) == 256
    assert chunked.chunk_tokens(10, 3, 16, 1024, 2) == 32
