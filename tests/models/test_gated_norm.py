"""RMSNorm with an output gate against its formula in float64: in plain torch, and in C++."""

import pytest
import torch
from torch.nn import functional as F

from lmu_dist.models.kernels import compiled
from lmu_dist.models.mixers import gated_norm
from lmu_dist.models.mixers.gated_norm import GatedRMSNorm
from lmu_dist.models.norms import RMS_EPS

# One row; a block of 64 rows and some; a whole number of blocks. Channels of a group below, above and a multiple of 16 lanes.
SIZES = [((1, 1, 3), 1), ((2, 35, 2, 32), 1), ((2, 64, 51), 3), ((3, 40, 64), 2)]


def reference(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, n_groups: int, gate_first: bool) -> torch.Tensor:
    y = (x * F.silu(gate) if gate_first else x).unflatten(-1, (n_groups, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()).flatten(-2) * weight
    return y if gate_first else y * F.silu(gate)


@pytest.mark.parametrize(("gate_first", "scale"), [(False, 1), (True, 1), (False, 1e4)])
@pytest.mark.parametrize(("size", "n_groups"), SIZES)
@pytest.mark.parametrize("form", ["torch", "cpp"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["f64", "f32", "bf16"]
)
def test_outputs_and_gradients_are_those_of_the_formula(size, n_groups, gate_first, scale, dtype, bound, form, monkeypatch):
    """In bfloat16 x, the outputs of a recurrence, is float32. With large gates SiLU's slope is 0 or 1."""
    if form == "torch":
        monkeypatch.setattr(gated_norm, "_is_in_cpp", lambda *_: False)
    elif dtype == torch.float64 or compiled.library() is None:
        pytest.skip("C++ has no float64, or there is no C++ compiler")
    rng = torch.Generator().manual_seed(0)
    x, gate, dy, weight = (torch.randn(s, generator=rng) for s in (size, size, size, size[-1:]))
    x = x.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    gate = (gate.to(dtype) * scale).requires_grad_()
    module = GatedRMSNorm(size[-1], n_groups, gate_first).to(dtype)
    module.weight.data.copy_(weight)
    y = module(x, gate)
    found = y, *torch.autograd.grad(y, (x, gate, module.weight), dy.to(dtype))
    exact = [t.detach().double().requires_grad_() for t in (x, gate, module.weight)]
    y = reference(*exact, n_groups, gate_first)
    expected = y, *torch.autograd.grad(y, exact, dy.to(dtype).double())
    assert [t.dtype for t in found] == [dtype, x.dtype, dtype, dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() < bound * b.norm()


def test_tensors_with_gaps_are_read_right():
    torch.manual_seed(0)
    both = torch.randn(2, 30, 2, 24)
    x, gate = both[..., 0, :], both[..., 1, :]
    for gate_first in (False, True):
        module = GatedRMSNorm(24, 3, gate_first)
        expected = module(x.contiguous(), gate.contiguous())
        assert torch.equal(module(x, gate), expected)


def test_sums_do_not_depend_on_the_number_of_threads():
    (x, gate), module = torch.randn(2, 500, 40), GatedRMSNorm(40)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(module(x, gate).sum(), module.weight)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
