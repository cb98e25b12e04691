"""The LMU operator against the oracle, its forms against each other, and state carried across chunks."""

import numpy as np
import pytest
import torch
from oracle import lmu_block

from lmu_dist.models.mixers.lmu import chunked, fourier
from lmu_dist.models.mixers.lmu.legendre import row_scale
from lmu_dist.models.mixers.lmu.mixer import FORMS, LMU, Form, memory_readings, mixed

# (order, theta, length, width, reduced order): a length that is no power of two, q > n, q' = 1, q = 1, the paper's ratio
SHAPES = [
    (12, 20.0, 40, 5, 3),
    (20, 64.0, 7, 3, 2),
    (10, 16.0, 33, 4, 1),
    (1, 10.0, 12, 2, 1),
    (60, 24.0, 50, 6, 6),
    (100, 256.0, 300, 8, 10),
    (30, 8.0, 200, 3, 2),  # far longer than the memory's span
    (12, 6.0, 131, 17, 2),
]


def problem(order, theta, length, width, rows, dtype=torch.float64, batch=2):
    rng = np.random.default_rng(order)
    arrays = {
        "x": rng.standard_normal((batch, length, width)),
        "reading": rng.standard_normal((3 * rows, order)) / np.sqrt(order),
        "bias": rng.standard_normal(3 * rows) * 0.1,
        "p": rng.standard_normal(rows),
    }
    expected = lmu_block(arrays["x"], theta, arrays["reading"], arrays["bias"], arrays["p"])
    return {k: torch.from_numpy(v).to(dtype) for k, v in arrays.items()}, expected


def relative(got: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_block_equals_oracle(shape, form, dtype, bound):
    given, expected = problem(*shape, dtype=dtype)
    theta = shape[1]
    reading = given["reading"] * torch.from_numpy(row_scale(shape[0], theta)).to(dtype)
    out = mixed(given["x"], reading, given["bias"], given["p"], theta, form)
    assert out.dtype == dtype
    assert relative(out, expected["out"]) < bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["fft", "recurrent", "chunked"])
@pytest.mark.parametrize("cut", [1, 5, 6])
def test_state_carries_across_chunks(shape, form, cut):
    given, expected = problem(*shape)
    order, theta, _, width, _ = shape
    state = torch.zeros(2, order, width, dtype=torch.float64)
    chunks = []
    for x in (given["x"][:, :cut], given["x"][:, cut:]):
        readings, state = memory_readings(x, given["reading"], theta, state, form)
        chunks.append(readings)
    whole = given["reading"].numpy() @ expected["M"]
    assert relative(torch.cat(chunks, 1), whole) < 1e-12
    assert relative(state, expected["M"][:, -1]) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_forms_are_equal(shape):
    given, _ = problem(*shape)
    gradients = {form: gradients_of(given, shape[1], form) for form in FORMS}
    for form in FORMS:
        for got, expected in zip(gradients[form], gradients["recurrent"], strict=True):
            assert torch.allclose(got, expected, rtol=1e-8, atol=1e-9), form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "of_output", "of_gradients"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-2, 2e-2)])
def test_what_a_precision_costs(form, dtype, of_output, of_gradients):
    """Against float64 on the same rounded numbers, at the paper's theta and q : q'."""
    theta = 1024.0
    given, _ = problem(60, theta, 200, 20, 6, dtype=dtype)
    exact = {name: value.double() for name, value in given.items()}
    with torch.no_grad():
        expected = mixed(exact["x"], exact["reading"], exact["bias"], exact["p"], theta, "recurrent")
        got = mixed(given["x"], given["reading"], given["bias"], given["p"], theta, form)
    assert got.dtype == dtype
    assert relative(got, expected.numpy()) < of_output
    for mine, true in zip(gradients_of(given, theta, form), gradients_of(exact, theta, "recurrent"), strict=True):
        assert mine.dtype == dtype
        assert relative(mine, true.numpy()) < of_gradients


def gradients_of(given: dict[str, torch.Tensor], theta: float, form: Form) -> list[torch.Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    out = mixed(leaves["x"], leaves["reading"], leaves["bias"], leaves["p"], theta, form)
    out.backward(torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view_as(out).to(out.dtype))
    return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


def test_sublayer_reads_the_papers_basis():
    torch.manual_seed(0)
    lmu = LMU(order=12, reduced_order=3, theta_tokens=20.0).double()
    x = torch.randn(2, 30, 4, dtype=torch.float64)
    with torch.no_grad():
        lmu.bias.normal_()
        expected = lmu_block(x.numpy(), 20, lmu.reading_matrix.numpy(), lmu.bias.numpy(), lmu.p.numpy())
        assert relative(lmu(x), expected["out"]) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_by_products_equals_fused_by_transforms(dtype, bound, monkeypatch):
    given, _ = problem(60, 128.0, 200, 20, 6, dtype=dtype)
    expected = gradients_of(given, 128.0, "fused")
    monkeypatch.setattr(fourier, "serves", lambda *_: False)
    for mine, other in zip(gradients_of(given, 128.0, "fused"), expected, strict=True):
        assert relative(mine, other.double().numpy()) < bound


def test_products_of_bfloat16(monkeypatch):
    """As processors with tiles for it and GPUs take them, wherever this runs."""
    monkeypatch.setattr(fourier, "serves", lambda *_: False)
    monkeypatch.setattr(chunked, "product_dtype", lambda dtype, _: dtype)
    given, _ = problem(60, 128.0, 200, 20, 6, dtype=torch.bfloat16)
    exact = {name: value.double() for name, value in given.items()}
    for mine, true in zip(gradients_of(given, 128.0, "fused"), gradients_of(exact, 128.0, "recurrent"), strict=True):
        assert relative(mine, true.numpy()) < 3e-2


@pytest.mark.parametrize("by_products", [False, True])
def test_tensors_with_gaps_are_read_right(by_products, monkeypatch):
    if by_products:
        monkeypatch.setattr(fourier, "serves", lambda *_: False)
    given, _ = problem(12, 20.0, 64, 5, 3, dtype=torch.float32, batch=1)
    gaps = {
        "x": given["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "reading": given["reading"].T.contiguous().T,
        "bias": torch.full((1,), 0.3).expand(9),
        "p": torch.stack([given["p"]] * 2, 1)[:, 0],
    }
    whole = {name: value.contiguous() for name, value in gaps.items()}
    results = []
    for tensors in (gaps, whole):
        leaves = [tensors[name].detach().requires_grad_() for name in tensors]
        out = mixed(leaves[0], leaves[1], leaves[2], leaves[3], 20.0, "fused")
        loss = out.transpose(1, 2).contiguous().square().sum()  # its gradient comes back with gaps
        results.append([out.detach(), *torch.autograd.grad(loss, leaves)])
    # By norm: products of tensors with other strides may take their sums in another order, as on processors with AVX2 only.
    for got, expected in zip(*results, strict=True):
        assert relative(got, expected.numpy()) < 1e-5


def test_one_chunk_holds_no_powers():
    """They would be gigabytes for the largest models."""
    x = torch.zeros(2, 256, 204)
    plan = chunked.plan(x, 75, 250, 1024.0)
    assert plan.single
    assert plan.steps.powers.numel() == 0


def test_what_generation_made_serves_training():
    lmu, x = LMU(11, 2, 19.0, "chunked"), torch.randn(1, 8, 4)
    with torch.inference_mode():
        lmu(x)
        lmu.advance(x, None)
    lmu(x).sum().backward()
    LMU(11, 2, 19.0, "fft")(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by transforms and by products
def test_fused_goes_back_once(dtype):
    given, _ = problem(12, 20.0, 25, 4, 3, dtype=dtype)
    out = mixed(given["x"].requires_grad_(), given["reading"], given["bias"], given["p"], 20.0, "fused").sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
