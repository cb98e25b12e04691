"""The LMU operator against the oracle, its forms against each other, and state carried across chunks."""

import numpy as np
import pytest
import torch
from oracle import lmu_block

from lmu_dist.models.lmu import LMU, implicit_attention, memory_readings

# (order, theta, length, width, reduced order): a length that is no power of two, q > n, q' = 1, q = 1, the paper's ratio
SHAPES = [
    (12, 20.0, 40, 5, 3),
    (20, 64.0, 7, 3, 2),
    (10, 16.0, 33, 4, 1),
    (1, 10.0, 12, 2, 1),
    (60, 24.0, 50, 6, 6),
    (100, 256.0, 300, 8, 10),
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
@pytest.mark.parametrize("form", ["fft", "recurrent", "chunked"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_block_equals_oracle(shape, form, dtype, bound):
    given, expected = problem(*shape, dtype=dtype)
    readings, _ = memory_readings(given["x"], given["reading"], shape[1], form=form)
    out = implicit_attention(readings, given["bias"], given["p"])
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


def test_gradients_of_the_forms_are_equal():
    given, _ = problem(12, 20.0, 25, 4, 3)
    gradients = []
    for form in ("fft", "recurrent", "chunked"):
        leaves = {k: v.clone().requires_grad_() for k, v in given.items()}
        readings, _ = memory_readings(leaves["x"], leaves["reading"], 20.0, form=form)
        implicit_attention(readings, leaves["bias"], leaves["p"]).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for fft, recurrent in zip(*gradients, strict=True):
        assert torch.allclose(fft, recurrent, rtol=1e-9, atol=1e-10)


def test_sublayer_reads_the_papers_basis():
    torch.manual_seed(0)
    lmu = LMU(order=12, reduced_order=3, theta_tokens=20.0).double()
    x = torch.randn(2, 30, 4, dtype=torch.float64)
    with torch.no_grad():
        lmu.bias.normal_()
        expected = lmu_block(x.numpy(), 20, lmu.reading_matrix.numpy(), lmu.bias.numpy(), lmu.p.numpy())
        assert relative(lmu(x), expected["out"]) < 1e-12


def test_bfloat16_keeps_the_memory_in_float32():
    torch.manual_seed(0)
    lmu = LMU(order=30, reduced_order=3, theta_tokens=64.0)
    x = torch.randn(1, 100, 8)
    with torch.no_grad():
        exact = lmu.double()(x.double())
        rough = lmu.bfloat16()(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    # bfloat16 has 8 bits: its rounding of the input and of the weights alone is 0.4 % each
    assert float((rough - exact).norm() / exact.norm()) < 0.02
