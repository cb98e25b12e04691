"""The short convolution against torch's convolution with groups: in plain torch, and in C++."""

import pytest
import torch
from torch.nn import functional as F

from lmu_dist.models.kernels import compiled
from lmu_dist.models.mixers.short_convolution import ShortConvolution

# Fewer tokens than the kernel, one block of 32 tokens and some, a whole number of blocks; channels below and above 16 lanes.
SIZES = [(1, 1, 3), (2, 2, 16), (2, 32, 17), (3, 70, 37), (2, 96, 64)]


def reference(x: torch.Tensor, weight: torch.Tensor, silu: bool) -> torch.Tensor:
    channels, width = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight[:, None], padding=width - 1, groups=channels)[..., : x.shape[1]].transpose(1, 2)
    return F.silu(y) if silu else y


@pytest.mark.parametrize(("silu", "scale"), [(False, 1), (True, 1), (True, 1e4)])  # inputs at which SiLU's slope is 0 or 1
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["f64", "f32", "bf16"]
)
def test_outputs_and_gradients_are_those_of_torchs_convolution(size, width, silu, scale, dtype, bound):
    if dtype in compiled.DTYPES and compiled.library() is None:
        pytest.skip("there is no C++ compiler")
    rng = torch.Generator().manual_seed(width)
    torch.manual_seed(0)  # for the weights
    x, dy = (torch.randn(size, generator=rng).to(dtype) for _ in range(2))
    module = ShortConvolution(size[2], width, silu).to(dtype)
    x = (x * scale).requires_grad_()
    y = module(x)
    found = y, *torch.autograd.grad(y, (x, module.weight), dy)
    exact = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    y = reference(*exact, silu)
    expected = y, *torch.autograd.grad(y, exact, dy.double())
    if scale > 1 and dtype != torch.bfloat16:
        bound *= 25  # a sum near 0 has the rounding of its large terms
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() <= bound * max(b.norm(), 1e-20)  # far below 0 SiLU is 0 in float64


@torch.no_grad()
def test_chunks_with_state_equal_the_whole_text():
    module, x = ShortConvolution(5).double(), torch.randn(2, 13, 5, dtype=torch.float64)
    state, parts = None, []
    for part in x.split([1, 1, 2, 9], 1):
        y, state = module.advance(part, state)
        parts.append(y)
        assert state.shape == (2, 3, 5)
    assert (torch.cat(parts, 1) - module(x)).abs().max() < 1e-14


def test_sums_do_not_depend_on_the_number_of_threads():
    x, module = torch.randn(2, 200, 40), ShortConvolution(40)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(module(x).sum(), module.weight)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
