"""The blocked cross-entropy head against plain torch, and the memory it uses."""

import pytest
import torch
from torch.nn import functional as F

from lmu_dist.models import head

N, D, V = 37, 5, 23
# Equal weights of the targets as one number, equal weights as N numbers, unequal weights.
LOSSES = {"sum": lambda losses: losses.sum() / N, "mean": torch.Tensor.mean, "squares": lambda losses: losses.square().mean()}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "MAX_LOGITS", 4 * V)  # ten blocks, the last of one row


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_(), torch.randint(V, (N,))


def blocked_and_plain(dtype: torch.dtype, reduce) -> list[tuple[torch.Tensor, ...]]:
    """Losses and gradients of the blocked head, and of plain torch in float64."""
    x, w, targets = problem(dtype)
    results = []
    for a, b, loss in (
        (x, w, head.linear_cross_entropy),
        (x.detach().double().requires_grad_(), w.detach().double().requires_grad_(), plain),
    ):
        losses = loss(a, b, targets)
        results.append((losses.detach(), *torch.autograd.grad(reduce(losses), (a, b))))
    return results


def plain(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w), targets, reduction="none")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("loss", LOSSES)
def test_blocked_equals_plain(dtype, bound, loss):
    got, expected = blocked_and_plain(dtype, LOSSES[loss])
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in got[1:]] == [dtype, dtype]
    for actual, exact in zip(got, expected, strict=True):
        assert float((actual.double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize(("loss", "passes"), [("sum", 1), ("mean", 2)])
def test_gradients_are_computed_once_if_the_weights_are_equal(loss, passes, monkeypatch: pytest.MonkeyPatch):
    calls, compute = list[bool](), head._losses_and_gradients
    monkeypatch.setattr(head, "_losses_and_gradients", lambda *args: (calls.append(True), compute(*args))[1])
    x, w, targets = problem(torch.float32)
    LOSSES[loss](head.linear_cross_entropy(x, w, targets)).backward()
    assert len(calls) == passes


def test_bfloat16_products(monkeypatch: pytest.MonkeyPatch):
    """With the products a GPU uses, on any machine."""
    monkeypatch.setattr(head, "product_dtype", lambda dtype, _: dtype)
    for actual, exact in zip(*blocked_and_plain(torch.bfloat16, torch.Tensor.mean), strict=True):
        assert float((actual.double() - exact).norm() / exact.norm()) < 1e-2


def test_large_logits_and_nan():
    x, w, targets = problem(torch.float32)
    with torch.no_grad():
        x.mul_(1000)
        expected = plain(x, w, targets)
        assert float((head.linear_cross_entropy(x, w, targets) - expected).norm() / expected.norm()) < 1e-6
        x[3, 0] = torch.nan
        assert head.linear_cross_entropy(x, w, targets).isnan().nonzero().flatten().tolist() == [3]


def test_no_more_than_one_block_of_logits_exists():
    x, w, targets = problem(torch.float32)
    sizes = list[int]()

    class RecordSizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with RecordSizes():
        head.linear_cross_entropy(x, w, targets).mean().backward()
    assert max(sizes) == max(4 * V, N * D, V * D) < N * V


def test_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch):
    """Under no_grad() the weights still require gradients. The sum of them would be as large as the head."""
    asked, compute = [], head._losses_and_gradients

    def spy(x, weight, targets, dloss, with_gradients):
        asked.append(with_gradients)
        return compute(x, weight, targets, dloss, with_gradients)

    monkeypatch.setattr(head, "_losses_and_gradients", spy)
    x, w, targets = problem(torch.float32)
    with torch.no_grad():
        without = head.linear_cross_entropy(x, w, targets)
    assert torch.equal(without, head.linear_cross_entropy(x, w, targets))
    assert asked == [False, True]
