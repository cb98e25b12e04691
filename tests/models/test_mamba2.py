"""Mamba-2 against the paper's equations, Mamba-2 of transformers and fla's reference of simple GLA, in float64."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from float64 import check_gradients, check_rounding, in_float64
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lmu_dist.models.kernels import compiled
from lmu_dist.models.kernels import ssd as kernel
from lmu_dist.models.mixers import gpu_kernels, ssd
from lmu_dist.models.mixers.mamba2 import Mamba2
from lmu_dist.models.registry import find
from lmu_dist.models.sizing import shape_for

WIDTH, HEADS, CHANNELS, STATE = 12, 4, 5, 6
LENGTHS = (1, 2, 31, 32, 33, 100)  # chunks have 32 tokens
GROUPS = (1, 2)


def build(n_groups: int = 1, dtype: torch.dtype = torch.float64) -> Mamba2:
    torch.manual_seed(0)
    mixer = Mamba2(WIDTH, HEADS, CHANNELS, STATE, n_groups).to(dtype)
    with torch.no_grad():  # steps of the size of 1 let the state forget, and gains and skips differ
        mixer.norm.weight += 0.3 * torch.randn(HEADS * CHANNELS)
        mixer.D += 0.3 * torch.randn(HEADS)
        mixer.dt_bias += 3
    return mixer


def text(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def ssd_inputs(length: int, n_groups: int, **changed: torch.Tensor) -> list[torch.Tensor]:
    """x, dt, rates, B, C, skips and a first state."""
    rng = torch.Generator().manual_seed(length)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=rng, dtype=torch.float64)

    found = {"x": draw(2, length, HEADS, CHANNELS), "dt": F.softplus(draw(2, length, HEADS)), "rates": -draw(HEADS).exp()}
    found |= {name: draw(2, length, n_groups, STATE) for name in ("b", "c")}
    found |= {"skip": draw(HEADS), "state": draw(2, n_groups, STATE, HEADS // n_groups, CHANNELS)}
    return [x.requires_grad_() for x in (found | changed).values()]


def in_cpp(
    x: torch.Tensor,
    dt: torch.Tensor,
    rates: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state space in C++, with the arguments of the other forms."""
    if not kernel.is_available(x.dtype, x.device):
        pytest.skip("the C++ kernels cannot be built")
    packed = torch.cat([tensor.flatten(2) for tensor in (x, b, c)], -1)
    return kernel.state_space(packed, dt, rates, skip, b.shape[2:], state)


def by_the_paper(mixer: Mamba2, us: torch.Tensor) -> torch.Tensor:
    """The state space of every row, token and head: h = exp(dt A) h + dt B x^T, y = C h + D x, with the parts around it."""
    outputs, inner, n_groups = torch.zeros_like(us), HEADS * CHANNELS, mixer.n_groups
    for row, tokens in enumerate(us):
        mixed = tokens @ mixer.xbc.weight.T
        states = us.new_zeros(HEADS, CHANNELS, STATE)
        for t, u in enumerate(tokens):
            window = [mixed[t - 3 + j] * mixer.convolution.weight[:, j] for j in range(4) if t - 3 + j >= 0]
            x, b, c = F.silu(sum(window, torch.zeros(()))).split([inner, n_groups * STATE, n_groups * STATE])
            y = us.new_zeros(HEADS, CHANNELS)
            for h in range(HEADS):
                group = h * n_groups // HEADS
                x_h, b_h, c_h = x.view(HEADS, -1)[h], b.view(n_groups, -1)[group], c.view(n_groups, -1)[group]
                dt = F.softplus(mixer.step.weight[h] @ u + mixer.dt_bias[h])
                states[h] = torch.exp(-dt * mixer.A_log[h].exp()) * states[h] + dt * torch.outer(x_h, b_h)
                y[h] = states[h] @ c_h + mixer.D[h] * x_h
            gated = (y.flatten() * F.silu(mixer.gate.weight @ u)).view(n_groups, -1)
            normed = gated / (gated.square().mean(1, keepdim=True) + 1e-6).sqrt()
            outputs[row, t] = mixer.out.weight @ (normed.flatten() * mixer.norm.weight)
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("n_groups", GROUPS)
@pytest.mark.parametrize("length", [1, 33, 70])
def test_mixer_equals_the_papers_equations(length: int, n_groups: int):
    mixer, u = build(n_groups), text(length)
    expected = by_the_paper(mixer, u)
    assert (mixer(u) - expected).norm() < 1e-12 * expected.norm()


def as_transformers(mixer: Mamba2, module: Any) -> torch.nn.Module:
    """The mixer of transformers with the same weights."""
    config = SimpleNamespace(
        hidden_size=WIDTH,
        num_heads=HEADS,
        head_dim=CHANNELS,
        expand=HEADS * CHANNELS / WIDTH + 1e-9,
        state_size=STATE,
        n_groups=mixer.n_groups,
        conv_kernel=4,
        chunk_size=8,
        time_step_rank=1,
        time_step_limit=(0.0, math.inf),
        time_step_min=0.001,
        time_step_max=0.1,
        time_step_floor=1e-4,
        use_conv_bias=False,
        use_bias=False,
        hidden_act="silu",
        layer_norm_epsilon=1e-6,
        layer_types=["linear_attention"],
    )
    other = module.Mamba2Mixer(config, 0).double()
    weights = {
        "in_proj.weight": torch.cat([mixer.gate.weight, mixer.xbc.weight, mixer.step.weight]),
        "conv1d.weight": mixer.convolution.weight.unsqueeze(1),
        "out_proj.weight": mixer.out.weight,
    }
    weights |= {name: mixer.get_parameter(name) for name in ("A_log", "dt_bias", "D", "norm.weight")}
    other.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return other


@pytest.mark.parametrize("n_groups", GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_mixer_equals_that_of_transformers(length: int, n_groups: int, monkeypatch: pytest.MonkeyPatch):
    module = in_float64("transformers.models.mamba2.modeling_mamba2", "dev", monkeypatch)
    mixer = build(n_groups)
    other, u = as_transformers(mixer, module), text(length).requires_grad_()
    found, expected = mixer(u), other(u)
    assert (found - expected).norm() < 1e-10 * expected.norm()
    names = ("A_log", "dt_bias", "D", "norm.weight")  # the others have other shapes there
    pairs = [(u, u), *((mixer.get_parameter(name), other.get_parameter(name)) for name in names)]
    pairs.append((mixer.out.weight, other.out_proj.weight))
    check_gradients(found, expected, pairs)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # fla warns that there is no GPU
def test_states_equal_flas_reference(monkeypatch: pytest.MonkeyPatch):
    module = in_float64("fla.ops.simple_gla.naive", "dev", monkeypatch)
    x, dt, rates, b, c, _, state = ssd_inputs(70, 1)
    q, k, v = c.expand(-1, -1, HEADS, -1), b.expand(-1, -1, HEADS, -1), x * dt[..., None]
    expected, end = module.naive_recurrent_simple_gla(q, k, v, dt * rates, 1.0, state[:, 0].transpose(1, 2))
    found, found_end = ssd.chunked(x, dt, rates, b, c, torch.zeros(HEADS), state)
    assert (found - expected).norm() < 1e-12 * expected.norm()
    assert (found_end[:, 0].transpose(1, 2) - end).norm() < 1e-12 * end.norm()


@pytest.mark.parametrize("n_groups", GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_and_their_gradients_equal_the_recurrence(length: int, n_groups: int):
    inputs = ssd_inputs(length, n_groups)
    results = [form(*inputs) for form in (ssd.chunked, ssd.recurrent)]
    weights = [torch.randn_like(x) for x in results[0]]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(result, weights, strict=True)), inputs) for result in results
    ]
    for a, b in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        assert (a - b).norm() < 1e-12 * b.norm()


@pytest.mark.parametrize(
    ("length", "heads", "channels", "groups", "states"),
    [
        (1, 1, 1, 1, 1),
        (31, 3, 5, 1, 6),
        (32, 4, 16, 2, 16),
        (33, 6, 8, 3, 17),
        (70, 13, 32, 1, 128),
        (100, 5, 64, 1, 33),
        (65, 18, 40, 2, 20),
        (1000, 2, 8, 1, 16),
    ],
)
def test_cpp_equals_the_recurrence_of_float64(length: int, heads: int, channels: int, groups: int, states: int):
    """Errors of the norm, of outputs, of the last state and of all gradients, for widths that fill vectors or do not.

    In the longest text states decay slowly: they are much larger than what a token adds.
    """
    rng = torch.Generator().manual_seed(length)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=rng, dtype=torch.float64)

    x, dt, rates = draw(2, length, heads, channels), F.softplus(draw(2, length, heads) - 2 - length / 200), -draw(heads).exp()
    b, c = draw(2, length, groups, states), draw(2, length, groups, states)
    inputs = (x, dt, rates, b, c, draw(heads), draw(2, groups, states, heads // groups, channels))
    exact = [x.requires_grad_() for x in inputs]
    low = [x.detach().float().requires_grad_() for x in inputs]
    results = ssd.recurrent(*exact), in_cpp(*low)
    weights = [draw(*result.shape) for result in results[0]]
    gradients = [
        torch.autograd.grad(sum((x * w.to(x.dtype)).sum() for x, w in zip(result, weights, strict=True)), inputs)
        for result, inputs in zip(results, (exact, low), strict=True)
    ]
    for a, b in zip((*results[1], *gradients[1]), (*results[0], *gradients[0]), strict=True):
        assert (a - b).norm() < 2e-6 * b.norm()


def test_sums_in_cpp_do_not_depend_on_the_number_of_threads():
    inputs = [x.detach().float().requires_grad_() for x in ssd_inputs(100, 2)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs = in_cpp(*inputs)
            results.append([*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_last_state_in_cpp_does_not_keep_the_states_of_all_chunks():
    x, b, c = torch.randn(1, 100, 1, 16), torch.randn(1, 100, 1, 8), torch.randn(1, 100, 1, 8)
    _, state = in_cpp(x, torch.rand(1, 100, 1), -torch.ones(1), b, c, torch.ones(1), torch.zeros(1, 1, 8, 1, 16))
    assert state.untyped_storage().nbytes() == 4 * 8 * 16


@torch.no_grad()
@pytest.mark.parametrize("n_groups", GROUPS)
@pytest.mark.parametrize("parts", [[1] * 70, [70], [3, 1, 1, 32, 33], [40, 1, 29]])
def test_states_pass_from_chunk_to_chunk(parts: list[int], n_groups: int):
    mixer, u = build(n_groups), text(70)
    state, outputs, sizes = None, [], set()
    for part in u.split(parts, 1):
        y, state = mixer.advance(part, state)
        outputs.append(y)
        sizes.add(tuple(s.shape for s in state))
    expected = mixer(u)
    assert (torch.cat(outputs, 1) - expected).norm() < 1e-12 * expected.norm()
    channels = HEADS * CHANNELS + 2 * n_groups * STATE
    assert sizes == {((2, 3, channels), (2, n_groups, STATE, HEADS // n_groups, CHANNELS))}


@torch.no_grad()
def test_no_token_depends_on_a_later_one():
    mixer, u = build(), text(70)
    before = mixer(u)
    for t in (1, 31, 32, 69):
        changed = u.clone()
        changed[:, t:] += 1
        assert torch.equal(mixer(changed)[:, :t], before[:, :t])


@pytest.mark.parametrize("form", [ssd.chunked, in_cpp])
@pytest.mark.parametrize("dt", [0.0, 1e-9, 60.0, 1e5])
def test_extreme_steps(dt: float, form: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
    exact = ssd_inputs(70, 1, dt=torch.full((2, 70, HEADS), dt, dtype=torch.float64))
    inputs = [x.detach().float().requires_grad_() for x in exact]
    expected, found = ssd.recurrent(*exact)[0], form(*inputs)[0]
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weights).sum(), exact)
    in_float32 = torch.autograd.grad((found * weights).sum(), inputs)
    assert (found - expected).norm() < 2e-6 * expected.norm()
    for a, b in zip(in_float32, gradients, strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-6 * weights.norm() * max(dt, 1)


@pytest.mark.parametrize("form", [ssd.chunked, in_cpp, ssd.recurrent])
@pytest.mark.parametrize("large", [0.01, 5.0, 1e3, 1e5])
def test_tokens_after_a_large_step_are_as_exact_as_others(large: float, form: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
    """Two tokens have a large step, which forgets all before; their own outputs are as much larger, and are left out."""
    dt = torch.full((2, 100, HEADS), 0.01, dtype=torch.float64)
    dt[:, [3, 50]] = large
    rates = -torch.tensor([1, 4, 10, 16], dtype=torch.float64)
    check_rounding(form, ssd.recurrent, ssd_inputs(100, 2, dt=dt, rates=rates), [3, 50], 2e-6)


@pytest.mark.parametrize("compiles", [True, False], ids=["cpp", "torch"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_rounding(dtype: torch.dtype, bound: float, compiles: bool, monkeypatch: pytest.MonkeyPatch):
    """Relative error of the norm of outputs and gradients, with weights that are numbers in the lower precision."""
    if not compiles:
        monkeypatch.setattr(compiled, "is_available", lambda *_: False)
    low = build(dtype=dtype)
    exact = build(dtype=dtype).double()
    u = text(200).to(dtype)
    inputs = [u.double().requires_grad_(), u.clone().requires_grad_()]
    outputs = [mixer(x) for mixer, x in zip((exact, low), inputs, strict=True)]
    assert outputs[1].dtype == dtype
    weights = torch.randn_like(outputs[0]).to(dtype).double()
    gradients = [
        torch.autograd.grad((y * weights.to(y.dtype)).sum(), [x, *mixer.parameters()])
        for y, x, mixer in zip(outputs, inputs, (exact, low), strict=True)
    ]
    assert (outputs[1] - outputs[0]).norm() < bound * outputs[0].norm()
    for a, b in zip(gradients[1], gradients[0], strict=True):
        assert (a - b).norm() < 3 * bound * b.norm()


@pytest.mark.parametrize("n_groups", GROUPS)
def test_kernels_of_fla_get_what_they_document(n_groups: int, monkeypatch: pytest.MonkeyPatch):
    """Plain torch in place of the kernel, with its layouts, defaults and names (fla-core 0.5.0 to 0.6.0)."""

    def chunk_simple_gla(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor | None = None,
        g_gamma: torch.Tensor | None = None,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[torch.Tensor, None]:
        assert g_gamma is initial_state is None
        assert not output_final_state
        assert g is not None
        assert g.dtype == torch.float32
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        (b, t, h, n_keys), n_values = q.shape, v.shape[-1]
        assert (k.shape, v.shape, g.shape) == (q.shape, (b, t, h, n_values), (b, t, h))
        scale = n_keys**-0.5 if scale is None else scale
        memory, outputs = torch.zeros(b, h, n_keys, n_values), []
        for i in range(t):
            memory = memory * g[:, i, :, None, None].exp() + k[:, i, :, :, None].float() * v[:, i, :, None].float()
            outputs.append((q[:, i, :, :, None].float() * scale * memory).sum(2))
        return torch.stack(outputs, 1).to(q.dtype), None

    monkeypatch.setattr(gpu_kernels, "_fla", {"simple_gla": chunk_simple_gla}.get)
    monkeypatch.setattr(gpu_kernels, "_compiles_on", lambda _: True)
    mixer, u = build(n_groups, torch.bfloat16), text(40).bfloat16()
    expected = mixer(u)
    assert gpu_kernels.operator_name("simple_gla", u.dtype, torch.device("cuda"), STATE) == "fla-core: simple_gla"
    for dtype in (torch.float32, torch.float64):
        assert gpu_kernels.operator_name("simple_gla", dtype, torch.device("cuda"), STATE) == "chunked"
    monkeypatch.setattr(gpu_kernels, "is_supported", lambda *_: True)
    found = mixer(u)
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_widths_and_initial_values_are_those_of_the_papers_code():
    family = find("mamba2")
    expected = {"d_ff": 1, "n_heads": 24, "head_width": 64, "d_state": 128, "n_groups": 1}  # mamba2-130m
    assert family.widths(768, 1024, family.Options()) == expected
    assert family.widths(64, 1024, family.Options()) == expected | {"n_heads": 8, "head_width": 16, "d_state": 64}
    chosen = family.Options(d_state=10, head_width=7, expand=3, n_groups=4)
    assert family.widths(64, 1024, chosen) == {"d_ff": 1, "n_heads": 28, "head_width": 7, "d_state": 10, "n_groups": 4}
    mixer = Mamba2(64, 1000, 1, 2)
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= rates.min() < 1.2 < 15.8 < rates.max() <= 16
    assert steps.log().mean().item() == pytest.approx(math.log(0.01), abs=0.2)
    assert 0.0009 < steps.min() < steps.max() < 0.101


@pytest.mark.parametrize("length", [64, 70])
def test_executed_flops_equal_torchs_counter(length: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "is_available", lambda *_: False)  # the counter does not see C++
    family = find("mamba2")
    shape = shape_for(family, 20_000, vocab_tokens=97, sequence_tokens=length)
    mixer, x = family.mixer(shape, family.Options()), torch.randn(2, length, shape.d_model, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = mixer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    counted = [2 * length * count for count in family.mixer_executed_flops(shape, 2, on_gpu=False)]
    assert [forward.get_total_flops(), backward.get_total_flops()] == pytest.approx(counted, rel=1e-12)


def test_a_cpu_computes_in_cpp_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch):
    family = find("mamba2")
    shape, cpu = shape_for(family, 100_000, vocab_tokens=97, sequence_tokens=64), torch.device("cpu")
    expected = "chunked, c++" if compiled.library() else "chunked"
    for dtype in (torch.float32, torch.bfloat16):
        assert family.operator(shape, family.Options(), dtype, cpu) == expected
    assert family.operator(shape, family.Options(), torch.float64, cpu) == "chunked"
    assert family.operator(shape, family.Options(), torch.float32, torch.device("cuda")) == "chunked"
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert family.operator(shape, family.Options(), torch.float32, cpu) == "chunked"
