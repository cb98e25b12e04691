"""Gated DeltaNet against the paper's equations, Qwen3-Next of transformers and fla's reference, in float64."""

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from float64 import check_gradients, check_rounding, in_float64
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lmu_dist.models import precision
from lmu_dist.models.kernels import compiled
from lmu_dist.models.kernels import gated_delta_rule as kernel
from lmu_dist.models.mixers import gated_delta_rule, gpu_kernels
from lmu_dist.models.mixers.gated_deltanet import GatedDeltaNet
from lmu_dist.models.registry import find
from lmu_dist.models.sizing import shape_for

WIDTH, HEADS, KEYS, VALUES = 12, 3, 4, 6
LENGTHS = (1, 2, 15, 16, 17, 70)  # chunks have 16 tokens


def build(dtype: torch.dtype = torch.float64) -> GatedDeltaNet:
    torch.manual_seed(0)
    mixer = GatedDeltaNet(WIDTH, HEADS, KEYS, VALUES).to(dtype)
    with torch.no_grad():
        mixer.norm.weight += 0.3 * torch.randn(VALUES)
    return mixer


def text(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def rule_inputs(length: int, dtype: torch.dtype = torch.float64, **changed: torch.Tensor) -> list[torch.Tensor]:
    """q, k, v, g, beta and a first state."""
    rng = torch.Generator().manual_seed(length)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(2, *sizes, generator=rng, dtype=torch.float64)

    found = {"q": draw(length, HEADS, KEYS), "k": draw(length, HEADS, KEYS), "v": draw(length, HEADS, VALUES)}
    found |= {"g": -F.softplus(draw(length, HEADS)), "beta": draw(length, HEADS).sigmoid(), "state": draw(HEADS, KEYS, VALUES)}
    return [x.to(dtype).requires_grad_() for x in (found | changed).values()]


def by_the_paper(mixer: GatedDeltaNet, x: torch.Tensor) -> torch.Tensor:
    """Equation 10 and figure 1 for every row, token and head, as they are printed: S is (V, K)."""
    outputs = torch.zeros_like(x)
    weight, (w_a, w_b) = mixer.convolution.weight, mixer.decay_and_beta.weight.chunk(2)
    for row, tokens in enumerate(x):
        mixed = tokens @ mixer.qkv.weight.T
        memory = x.new_zeros(HEADS, VALUES, KEYS)
        for t, u in enumerate(tokens):
            window = [mixed[t - 3 + j] * weight[:, j] for j in range(4) if t - 3 + j >= 0]
            q, k, v = F.silu(sum(window, torch.zeros(()))).split([HEADS * KEYS, HEADS * KEYS, HEADS * VALUES])
            o = x.new_zeros(HEADS, VALUES)
            for h in range(HEADS):
                q_h, k_h, v_h = (part.view(HEADS, -1)[h] for part in (q, k, v))
                q_h, k_h = q_h / (q_h @ q_h + 1e-6).sqrt(), k_h / (k_h @ k_h + 1e-6).sqrt()
                alpha = torch.exp(-mixer.A_log[h].exp() * F.softplus(w_a[h] @ u + mixer.dt_bias[h]))
                beta = torch.sigmoid(w_b[h] @ u)
                erase = torch.eye(KEYS, dtype=x.dtype) - beta * torch.outer(k_h, k_h)
                memory[h] = alpha * memory[h] @ erase + beta * torch.outer(v_h, k_h)
                o[h] = memory[h] @ q_h / KEYS**0.5
            normed = o / (o.square().mean(1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
            outputs[row, t] = mixer.out.weight @ (normed.flatten() * F.silu(mixer.gate.weight @ u))
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_mixer_equals_the_papers_equations(length: int):
    mixer, x = build(), text(length)
    expected = by_the_paper(mixer, x)
    assert (mixer(x) - expected).norm() < 1e-12 * expected.norm()


def as_qwen3_next(mixer: GatedDeltaNet, module: Any) -> torch.nn.Module:
    """The mixer of transformers with the same weights: there the rows of a joint projection are in the order of the heads."""
    config = SimpleNamespace(
        hidden_size=WIDTH,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=KEYS,
        linear_value_head_dim=VALUES,
        linear_conv_kernel_dim=4,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        layer_types=["linear_attention"],
    )
    other = module.Qwen3NextGatedDeltaNet(config, 0).double()
    q, k, v = mixer.qkv.weight.split([HEADS * KEYS, HEADS * KEYS, HEADS * VALUES])
    by_head = [part.unflatten(0, (HEADS, -1)) for part in (q, k, v, mixer.gate.weight)]
    a, b = mixer.decay_and_beta.weight.chunk(2)
    weights = {
        "in_proj_qkvz.weight": torch.cat(by_head, 1).flatten(0, 1),
        "in_proj_ba.weight": torch.stack([b, a], 1).flatten(0, 1),
        "conv1d.weight": mixer.convolution.weight.unsqueeze(1),
        "A_log": mixer.A_log,
        "dt_bias": mixer.dt_bias,
        "norm.weight": mixer.norm.weight,
        "out_proj.weight": mixer.out.weight,
    }
    other.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return other


@pytest.mark.parametrize("length", LENGTHS)
def test_mixer_equals_that_of_qwen3_next(length: int, monkeypatch: pytest.MonkeyPatch):
    module = in_float64("transformers.models.qwen3_next.modeling_qwen3_next", "dev", monkeypatch)
    mixer = build()
    other, x = as_qwen3_next(mixer, module), text(length).requires_grad_()
    found, expected = mixer(x), other(x)
    assert (found - expected).norm() < 1e-10 * expected.norm()
    names = ("A_log", "dt_bias", "norm.weight")  # the others have another order there
    pairs = [(x, x), *((mixer.get_parameter(name), other.get_parameter(name)) for name in names)]
    pairs.append((mixer.out.weight, other.out_proj.weight))
    check_gradients(found, expected, pairs)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # fla warns that there is no GPU
def test_rule_equals_flas_reference(monkeypatch: pytest.MonkeyPatch):
    module = in_float64("fla.ops.gated_delta_rule.naive", "dev", monkeypatch)
    q, k, v, g, beta, state = rule_inputs(70)
    unit = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    expected, end = module.naive_recurrent_gated_delta_rule(*unit, v, beta, g, initial_state=state, output_final_state=True)
    found = gated_delta_rule.chunked(q, k, v, g, beta, state)
    assert (found[0] - expected).norm() < 1e-12 * expected.norm()
    assert (found[1] - end).norm() < 1e-12 * end.norm()


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_and_their_gradients_equal_the_recurrence(length: int):
    inputs = rule_inputs(length)
    results = [form(*inputs) for form in (gated_delta_rule.chunked, gated_delta_rule.recurrent)]
    weights = [torch.randn_like(x) for x in results[0]]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(result, weights, strict=True)), inputs) for result in results
    ]
    for a, b in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        assert (a - b).norm() < 1e-12 * b.norm()


def in_cpp(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule in C++, with the arguments of the other forms."""
    if not kernel.is_available(q.dtype, q.device):
        pytest.skip("the C++ kernels cannot be built")
    packed = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    return kernel.gated_delta_rule(packed, g, beta, q.shape[-1], state)


@pytest.mark.parametrize(
    ("length", "heads", "keys", "values"),
    [(1, 3, 4, 6), (31, 1, 3, 1), (32, 2, 16, 16), (33, 3, 5, 5), (70, 2, 33, 17), (130, 1, 32, 64), (20, 1, 100, 250)],
)
def test_cpp_equals_the_recurrence_of_float64(length: int, heads: int, keys: int, values: int):
    """Errors of the norm, of outputs, of the last state and of all gradients, for widths that fill vectors or do not."""
    rng = torch.Generator().manual_seed(length)
    sizes = [(length, heads, keys), (length, heads, keys), (length, heads, values), (length, heads), (length, heads)]
    q, k, v, g, beta, state = (torch.randn(2, *s, generator=rng, dtype=torch.float64) for s in [*sizes, (heads, keys, values)])
    exact = [x.requires_grad_() for x in (q, k, v, -F.softplus(g), beta.sigmoid(), state)]
    low = [x.detach().float().requires_grad_() for x in exact]
    results = gated_delta_rule.recurrent(*exact), in_cpp(*low)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in results[0]]
    gradients = [
        torch.autograd.grad(sum((x * w.to(x.dtype)).sum() for x, w in zip(result, weights, strict=True)), inputs)
        for result, inputs in zip(results, (exact, low), strict=True)
    ]
    for a, b in zip((*results[1], *gradients[1]), (*results[0], *gradients[0]), strict=True):
        assert (a - b).norm() < 2e-6 * b.norm()


@torch.no_grad()
def test_cpp_keeps_a_query_that_is_no_number_to_its_own_token():
    """Also the tokens of later chunks, which take its place; keys do not fill a vector."""
    q, *others = (x.float() for x in rule_inputs(70))
    q[:, 3] = math.nan
    found = in_cpp(q, *others)[0].isfinite().flatten(2).all(2)
    assert found.sum(1).tolist() == [69, 69]
    assert not found[:, 3].any()


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 70, [70], [3, 1, 1, 16, 17, 32], [40, 1, 29]])
def test_states_pass_from_chunk_to_chunk(parts: list[int]):
    mixer, x = build(), text(70)
    state, outputs, sizes = None, [], set()
    for part in x.split(parts, 1):
        y, state = mixer.advance(part, state)
        outputs.append(y)
        sizes.add(tuple(s.shape for s in state))
    expected = mixer(x)
    assert (torch.cat(outputs, 1) - expected).norm() < 1e-12 * expected.norm()
    assert sizes == {((2, 3, HEADS * (2 * KEYS + VALUES)), (2, HEADS, KEYS, VALUES))}


@torch.no_grad()
def test_no_token_depends_on_a_later_one():
    mixer, x = build(), text(70)
    before = mixer(x)
    for t in (1, 15, 16, 69):
        changed = x.clone()
        changed[:, t:] += 1
        assert torch.equal(mixer(changed)[:, :t], before[:, :t])


@pytest.mark.parametrize("form", [gated_delta_rule.chunked, in_cpp])
@pytest.mark.parametrize("g", [0.0, -1e-9, -60.0, -1e5])
def test_extreme_decays_and_repeated_keys(g: float, form: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
    """All keys of a text are the same, and every update is a whole one."""
    ones = torch.ones(2, 70, HEADS, dtype=torch.float64)
    changed = {"k": torch.ones(2, 70, HEADS, KEYS, dtype=torch.float64), "g": g * ones, "beta": ones}
    exact = rule_inputs(70, **changed)
    inputs = [x.detach().float().requires_grad_() for x in exact]
    expected, found = gated_delta_rule.recurrent(*exact)[0], form(*inputs)[0]
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weights).sum(), exact)
    in_float32 = torch.autograd.grad((found * weights).sum(), inputs)
    assert (found - expected).norm() < 2e-6 * expected.norm()
    for a, b in zip(in_float32, gradients, strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() < 1e-5 * max(b.norm(), weights.norm())


@pytest.mark.parametrize("form", [gated_delta_rule.chunked, in_cpp, gated_delta_rule.recurrent])
@pytest.mark.parametrize("strong", [-0.01, -5.0, -1e3, -1e5])
def test_tokens_after_a_strong_decay_are_as_exact_as_others(
    strong: float, form: Callable[..., tuple[torch.Tensor, torch.Tensor]]
):
    """Also the gradient by the rate of a head, of which every log decay is a multiple."""
    g = torch.full((2, 70, HEADS), -0.01, dtype=torch.float64)
    g[:, [3, 50]] = strong
    gradients = check_rounding(form, gated_delta_rule.recurrent, rule_inputs(70, g=g), [], 1e-6)
    found, expected = ((of_inputs[3] * g).sum((0, 1)) for of_inputs in gradients)
    assert (found - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("compiles", [True, False], ids=["cpp", "torch"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_rounding(dtype: torch.dtype, bound: float, compiles: bool, monkeypatch: pytest.MonkeyPatch):
    """Relative error of the norm of outputs and gradients, with weights that are numbers in the lower precision."""
    if not compiles:
        monkeypatch.setattr(compiled, "is_available", lambda *_: False)
    low = build(dtype)
    exact = build(dtype).double()
    x = text(200).to(dtype)
    inputs = [x.double().requires_grad_(), x.clone().requires_grad_()]
    outputs = [mixer(u) for mixer, u in zip((exact, low), inputs, strict=True)]
    assert outputs[1].dtype == dtype
    weights = torch.randn_like(outputs[0]).to(dtype).double()
    gradients = [
        torch.autograd.grad((y * weights.to(y.dtype)).sum(), [u, *mixer.parameters()])
        for y, u, mixer in zip(outputs, inputs, (exact, low), strict=True)
    ]
    assert (outputs[1] - outputs[0]).norm() < bound * outputs[0].norm()
    for a, b in zip(gradients[1], gradients[0], strict=True):
        assert (a - b).norm() < 3 * bound * b.norm()


def test_kernels_of_fla_get_what_they_document(monkeypatch: pytest.MonkeyPatch):
    """Plain torch in place of the kernel, with its layouts, defaults and names (fla-core 0.5.0 to 0.6.0)."""

    def chunk_gated_delta_rule(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> tuple[torch.Tensor, None]:
        assert initial_state is None
        assert not output_final_state
        assert use_qk_l2norm_in_kernel
        assert scale is None
        assert all(x.is_contiguous() for x in (q, k, v, g, beta))
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert g.dtype == torch.float32
        (b, t, h, n_keys), n_values = k.shape, v.shape[-1]
        assert (q.shape, v.shape, g.shape, beta.shape) == (k.shape, (b, t, h, n_values), (b, t, h), (b, t, h))
        zeros = torch.zeros(b, h, n_keys, n_values)
        return gated_delta_rule.recurrent(q.float(), k.float(), v.float(), g, beta, zeros)[0].to(q.dtype), None

    monkeypatch.setattr(gpu_kernels, "_fla", {"gated_delta_rule": chunk_gated_delta_rule}.get)
    monkeypatch.setattr(gpu_kernels, "_compiles_on", lambda _: True)
    mixer, x = build(torch.bfloat16), text(40).bfloat16()
    expected = mixer(x)
    assert gpu_kernels.operator_name("gated_delta_rule", x.dtype, x.device, KEYS) == "chunked"
    gpu = torch.device("cuda")
    assert gpu_kernels.operator_name("gated_delta_rule", x.dtype, gpu, KEYS) == "fla-core: gated_delta_rule"
    assert gpu_kernels.operator_name("gated_delta_rule", x.dtype, gpu, 257) == "chunked"
    monkeypatch.setattr(gpu_kernels, "is_supported", lambda *_: True)
    found = mixer(x)
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(
    ("capability", "triton", "taken"), [((9, 0), "3.6.0", False), ((9, 0), "3.7.1", True), ((8, 9), "3.6.0", True)]
)
def test_fla_is_not_used_where_triton_compiles_it_wrongly(capability, triton, taken, monkeypatch, caplog):
    """On Hopper fla-core raises below Triton 3.7.1, in the backward pass only: after the record has named its kernels."""
    monkeypatch.setattr(gpu_kernels, "_fla", lambda _: print)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    for cached in (precision.is_hopper, gpu_kernels._compiles_on):
        cached.cache_clear()
    for _ in range(2):
        assert gpu_kernels.is_supported("gated_delta_rule", torch.bfloat16, torch.device("cuda", 0), KEYS) == taken
    for cached in (precision.is_hopper, gpu_kernels._compiles_on):
        cached.cache_clear()
    said = [message for message in caplog.messages if "fla-core refuses Triton 3.6.0 on this GPU" in message]
    assert len(said) == (not taken)


def test_without_fla_a_gpu_computes_in_chunks():
    shape = shape_for("gated_deltanet", 100_000, vocab_tokens=97, sequence_tokens=64)
    family = find("gated_deltanet")
    assert family.operator(shape, family.Options(), torch.float32, torch.device("cuda")) == "chunked"


def test_a_cpu_computes_token_by_token_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch):
    family = find("gated_deltanet")
    shape, cpu = shape_for(family, 100_000, vocab_tokens=97, sequence_tokens=64), torch.device("cpu")
    expected = "token by token, c++" if compiled.library() else "chunked"
    for dtype in (torch.float32, torch.bfloat16):
        assert family.operator(shape, family.Options(), dtype, cpu) == expected
    assert family.operator(shape, family.Options(), torch.float64, cpu) == "chunked"
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert family.operator(shape, family.Options(), torch.float32, cpu) == "chunked"


def test_widths_and_initial_values_are_those_of_the_papers_code():
    family = find("gated_deltanet")
    options = family.Options()
    assert family.widths(2048, 1024, options) == {"d_ff": 1, "n_heads": 6, "key_width": 256, "value_width": 512}
    assert family.widths(64, 1024, options) == {"d_ff": 1, "n_heads": 3, "key_width": 16, "value_width": 32}
    assert family.widths(64, 1024, family.Options(n_heads=2, key_width=5, value_expansion=1)) == {
        "d_ff": 1,
        "n_heads": 2,
        "key_width": 5,
        "value_width": 5,
    }
    mixer = GatedDeltaNet(64, 1000, 2, 2)
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 0.01 < rates.min() < 0.2 < 15.8 < rates.max() <= 16
    assert steps.log().mean().item() == pytest.approx(math.log(0.01), abs=0.2)
    assert 0.0009 < steps.min() < steps.max() < 0.101


@pytest.mark.parametrize("length", [64, 70])
def test_executed_flops_equal_torchs_counter(length: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "is_available", lambda *_: False)  # torch counts no FLOPs of C++
    family = find("gated_deltanet")
    shape = shape_for(family, 20_000, vocab_tokens=97, sequence_tokens=length)
    mixer, x = family.mixer(shape, family.Options()), torch.randn(2, length, shape.d_model, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = mixer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    counted = [2 * length * count for count in family.mixer_executed_flops(shape, 2, on_gpu=False)]
    assert [forward.get_total_flops(), backward.get_total_flops()] == pytest.approx(counted, rel=1e-12)
