"""The head in blocks against all logits at once, and what it holds."""

import pytest
import torch
from torch.nn import functional as F

from lmu_dist.models import head

N, D, V = 37, 5, 23


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "LOGITS", 4 * V)  # ten blocks, the last of one row


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_(), torch.randint(V, (N,))


def both(dtype: torch.dtype, weigh) -> list[tuple[torch.Tensor, ...]]:
    """Losses and gradients of the head in blocks, and of the plain one in float64."""
    x, w, targets = problem(dtype)
    results = []
    for a, b, loss in (
        (x, w, head.linear_cross_entropy),
        (x.detach().double().requires_grad_(), w.detach().double().requires_grad_(), plain),
    ):
        losses = loss(a, b, targets)
        results.append((losses.detach(), *torch.autograd.grad(weigh(losses), (a, b))))
    return results


def plain(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w), targets, reduction="none")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("weights", ["alike", "mean of squares"])
def test_blocks_equal_the_whole(dtype, bound, weights):
    got, expected = both(dtype, torch.Tensor.mean if weights == "alike" else lambda losses: losses.square().mean())
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in got[1:]] == [dtype, dtype]
    for mine, exact in zip(got, expected, strict=True):
        assert float((mine.double() - exact).norm() / exact.norm()) < bound


def test_products_of_bfloat16(monkeypatch: pytest.MonkeyPatch):
    """As GPUs take them, wherever this runs."""
    monkeypatch.setattr(head, "product_dtype", lambda dtype, _: dtype)
    for mine, exact in zip(*both(torch.bfloat16, torch.Tensor.mean), strict=True):
        assert float((mine.double() - exact).norm() / exact.norm()) < 1e-2


def test_logits_far_apart_and_what_is_not_a_number():
    x, w, targets = problem(torch.float32)
    with torch.no_grad():
        x.mul_(1000)
        expected = plain(x, w, targets)
        assert float((head.linear_cross_entropy(x, w, targets) - expected).norm() / expected.norm()) < 1e-6
        x[3, 0] = torch.nan
        assert head.linear_cross_entropy(x, w, targets).isnan().nonzero().flatten().tolist() == [3]


def test_no_more_than_a_block_of_logits_exists():
    x, w, targets = problem(torch.float32)
    made = list[int]()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Watch():
        head.linear_cross_entropy(x, w, targets).mean().backward()
    assert max(made) == max(4 * V, N * D, V * D) < N * V
