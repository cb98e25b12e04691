"""The LMU operator against the oracle, its forms against each other, and state passed from chunk to chunk."""

import numpy as np
import pytest
import torch
from oracle import lmu_block

from lmu_dist.models.mixers.lmu import chunked, fourier, mixer
from lmu_dist.models.mixers.lmu.legendre import row_scale
from lmu_dist.models.mixers.lmu.mixer import FORMS, LMU, Form, lmu_mixer, projected_memory

# (order, theta, length, width, reduced order): no power of two as length, q > n, q' = 1, q = 1, the paper's q : q'
SHAPES = [
    (12, 20.0, 40, 5, 3),
    (20, 64.0, 7, 3, 2),
    (10, 16.0, 33, 4, 1),
    (1, 10.0, 12, 2, 1),
    (60, 24.0, 50, 6, 6),
    (100, 256.0, 300, 8, 10),
    (30, 8.0, 200, 3, 2),  # far longer than the memory remembers
    (12, 6.0, 131, 17, 2),
]


def problem(order, theta, length, width, rows, dtype=torch.float64, batch=2):
    rng = np.random.default_rng(order)
    arrays = {
        "x": rng.standard_normal((batch, length, width)),
        "projection": rng.standard_normal((3 * rows, order)) / np.sqrt(order),
        "bias": rng.standard_normal(3 * rows) * 0.1,
        "p": rng.standard_normal(rows),
    }
    expected = lmu_block(arrays["x"], theta, arrays["projection"], arrays["bias"], arrays["p"])
    return {k: torch.from_numpy(v).to(dtype) for k, v in arrays.items()}, expected


def relative_error(got: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_operator_equals_oracle(shape, form, dtype, bound):
    given, expected = problem(*shape, dtype=dtype)
    theta = shape[1]
    projection = given["projection"] * torch.from_numpy(row_scale(shape[0], theta)).to(dtype)
    out = lmu_mixer(given["x"], projection, given["bias"], given["p"], theta, form)
    assert out.dtype == dtype
    assert relative_error(out, expected["out"]) < bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["fft", "recurrent", "chunked"])
@pytest.mark.parametrize("cut", [1, 5, 6])
def test_state_continues_a_sequence_exactly(shape, form, cut):
    given, expected = problem(*shape)
    order, theta, _, width, _ = shape
    state = torch.zeros(2, order, width, dtype=torch.float64)
    chunks = []
    for x in (given["x"][:, :cut], given["x"][:, cut:]):
        projected, state = projected_memory(x, given["projection"], theta, state, form)
        chunks.append(projected)
    whole = given["projection"].numpy() @ expected["M"]
    assert relative_error(torch.cat(chunks, 1), whole) < 1e-12
    assert relative_error(state, expected["M"][:, -1]) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_forms_have_equal_gradients(shape):
    given, _ = problem(*shape)
    gradients_by_form = {form: gradients(given, shape[1], form) for form in FORMS}
    for form in FORMS:
        for got, expected in zip(gradients_by_form[form], gradients_by_form["recurrent"], strict=True):
            assert torch.allclose(got, expected, rtol=1e-8, atol=1e-9), form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "output_bound", "gradient_bound"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-2, 2e-2)]
)
def test_error_of_low_precision(form, dtype, output_bound, gradient_bound):
    """Against float64 with the same rounded inputs, at the paper's theta and q : q'."""
    theta = 1024.0
    given, _ = problem(60, theta, 200, 20, 6, dtype=dtype)
    exact = {name: value.double() for name, value in given.items()}
    with torch.no_grad():
        expected = lmu_mixer(exact["x"], exact["projection"], exact["bias"], exact["p"], theta, "recurrent")
        got = lmu_mixer(given["x"], given["projection"], given["bias"], given["p"], theta, form)
    assert got.dtype == dtype
    assert relative_error(got, expected.numpy()) < output_bound
    for actual, expected_gradient in zip(gradients(given, theta, form), gradients(exact, theta, "recurrent"), strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, expected_gradient.numpy()) < gradient_bound


def gradients(given: dict[str, torch.Tensor], theta: float, form: Form) -> list[torch.Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    out = lmu_mixer(leaves["x"], leaves["projection"], leaves["bias"], leaves["p"], theta, form)
    out.backward(torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view_as(out).to(out.dtype))
    return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


def test_projection_matrix_is_in_the_papers_basis():
    torch.manual_seed(0)
    lmu = LMU(order=12, reduced_order=3, theta_tokens=20.0).double()
    x = torch.randn(2, 30, 4, dtype=torch.float64)
    with torch.no_grad():
        lmu.bias.normal_()
        expected = lmu_block(x.numpy(), 20, lmu.projection_matrix.numpy(), lmu.bias.numpy(), lmu.p.numpy())
        assert relative_error(lmu(x), expected["out"]) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_chunked_equals_fused_fourier(dtype, bound, monkeypatch):
    given, _ = problem(60, 128.0, 200, 20, 6, dtype=dtype)
    expected = gradients(given, 128.0, "fused")
    monkeypatch.setattr(fourier, "is_supported", lambda *_: False)
    for actual, other in zip(gradients(given, 128.0, "fused"), expected, strict=True):
        assert relative_error(actual, other.double().numpy()) < bound


def test_bfloat16_products(monkeypatch):
    """With the products that GPUs and CPUs with AMX tiles use, on any machine."""
    monkeypatch.setattr(fourier, "is_supported", lambda *_: False)
    monkeypatch.setattr(chunked, "product_dtype", lambda dtype, _: dtype)
    given, _ = problem(60, 128.0, 200, 20, 6, dtype=torch.bfloat16)
    exact = {name: value.double() for name, value in given.items()}
    for actual, expected_gradient in zip(gradients(given, 128.0, "fused"), gradients(exact, 128.0, "recurrent"), strict=True):
        assert relative_error(actual, expected_gradient.numpy()) < 3e-2


@pytest.mark.parametrize("use_chunked", [False, True])
def test_non_contiguous_tensors(use_chunked, monkeypatch):
    if use_chunked:
        monkeypatch.setattr(fourier, "is_supported", lambda *_: False)
    given, _ = problem(12, 20.0, 64, 5, 3, dtype=torch.float32, batch=1)
    strided = {
        "x": given["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "projection": given["projection"].T.contiguous().T,
        "bias": torch.full((1,), 0.3).expand(9),
        "p": torch.stack([given["p"]] * 2, 1)[:, 0],
    }
    contiguous = {name: value.contiguous() for name, value in strided.items()}
    results = []
    for tensors in (strided, contiguous):
        leaves = [tensors[name].detach().requires_grad_() for name in tensors]
        out = lmu_mixer(leaves[0], leaves[1], leaves[2], leaves[3], 20.0, "fused")
        loss = out.transpose(1, 2).contiguous().square().sum()  # makes the gradient of out non-contiguous
        results.append([out.detach(), *torch.autograd.grad(loss, leaves)])
    # Not bitwise: with other strides a product may sum in another order, as it does on CPUs with AVX2 only.
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected.numpy()) < 1e-5


def test_single_chunk_stores_no_matrix_powers():
    """They would take gigabytes in the largest models."""
    x = torch.zeros(2, 256, 204)
    config = chunked.chunked_config(x, 75, 250, 1024.0)
    assert config.single_chunk
    assert config.transition.a_powers.numel() == 0


def test_training_can_use_tensors_cached_in_inference_mode():
    lmu, x = LMU(11, 2, 19.0, "chunked"), torch.randn(1, 8, 4)
    with torch.inference_mode():
        lmu(x)
        lmu.advance(x, None)
    lmu(x).sum().backward()
    LMU(11, 2, 19.0, "fft")(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by Fourier transforms and in chunks
def test_a_kept_graph_of_fused_has_more_backward_passes(dtype):
    """Though the kernels overwrite what was saved; without `retain_graph` torch refuses a second one itself."""
    given, _ = problem(12, 20.0, 25, 4, 3, dtype=dtype)
    leaves = [given[name].requires_grad_() for name in ("x", "projection", "bias", "p")]
    loss = lmu_mixer(*leaves, 20.0, "fused").square().sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    last = torch.autograd.grad(loss, leaves)
    for gradients in zip(first, second, last, strict=True):
        assert torch.equal(gradients[0], gradients[1])
        assert torch.equal(gradients[0], gradients[2])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_may_be_changed_in_place(form, dtype):
    """As a residual connection does: y += x."""
    given, _ = problem(12, 20.0, 25, 16, 3, dtype=dtype)
    x = given["x"].requires_grad_()
    y = lmu_mixer(x, given["projection"], given["bias"], given["p"], 20.0, form)
    [expected] = torch.autograd.grad((y + x).square().sum(), x)
    y = lmu_mixer(x, given["projection"], given["bias"], given["p"], 20.0, form)
    y += x
    [got] = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_does_not_depend_on_torchs_default_dtype(default, dtype):
    given, _ = problem(12, 20.0, 25, 4, 3, dtype=dtype)
    expected = gradients(given, 20.0, "fused")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        got = gradients(given, 20.0, "fused")
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_matrices_are_kept_for_few_of_all_lengths():
    """Each length of a sequence would keep its own impulse response, and each remainder of a chunk its own powers."""
    lmu = LMU(7, 2, 23.0)
    mixer._impulse_response.cache_clear()
    chunked.chunk_transition.cache_clear()
    with torch.no_grad():
        for length in range(2, 200):
            lmu(torch.ones(1, length, 3))
            lmu.advance(torch.ones(1, length, 3))
    assert mixer._impulse_response.cache_info().currsize <= 8  # 2, 4, .. 256
    assert chunked.chunk_transition.cache_info().currsize <= 6  # 1, 2, .. 32


@pytest.mark.parametrize(("late", "unchanged"), [(1e8, 250), (torch.inf, 224), (torch.nan, 224)])
def test_in_chunks_an_outlier_changes_no_output_before_it(late, unchanged):
    """Fourier transforms mix all tokens: docs/library.md has the numbers. Infinities reach the tokens of their chunk of 32."""
    torch.manual_seed(0)
    lmu, x = LMU(12, 3, 40.0, "chunked"), torch.randn(1, 300, 4)
    other = x.clone()
    other[0, 250, 2] = late
    with torch.no_grad():
        assert torch.equal(lmu(other)[:, :unchanged], lmu(x)[:, :unchanged])
        assert torch.equal(lmu.advance(other)[0][:, :unchanged], lmu.advance(x)[0][:, :unchanged])
