"""What tests compare with float64: gradients, rounding, and modules of transformers and fla as oracles.

Those modules compute decays, norms and recurrences in float32 at any precision, and take kernels for GPUs where they can.
"""

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class Float64:
    """The module torch with float64 in place of float32, to replace `torch` in the namespace of a module."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


def check_gradients(found: Tensor, expected: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Checks that two equal outputs have equal gradients in pairs of inputs or weights, to 1e-10."""
    weights = torch.randn_like(found)
    ours, theirs = zip(*pairs, strict=True)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), ours),
        torch.autograd.grad((expected * weights).sum(), theirs),
        strict=True,
    ):
        assert (a - b).norm() <= 1e-10 * max(b.norm(), expected.norm())


def check_rounding(
    form: Callable[..., tuple[Tensor, Tensor]],
    exact_form: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    left_out: Sequence[int],
    bound: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compares outputs, last state and gradients of float32 inputs with those of float64, by the error of their norms.

    Outputs (B, T, ..) of the tokens in `left_out` are not compared. Returns both gradients.
    """
    low = [x.detach().float().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in low]
    results = list[tuple[Tensor, Tensor]]()
    for run, given in ((form, low), (exact_form, exact)):
        y, state = run(*given)
        results.append((y.index_fill(1, torch.tensor(left_out, dtype=torch.long), 0.0), state))
    weights = [torch.randn_like(x) for x in results[1]]
    gradients = [
        torch.autograd.grad(result, given, [weight.to(given[0].dtype) for weight in weights])
        for result, given in zip(results, (low, exact), strict=True)
    ]
    for a, b in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        assert (a - b).norm() <= bound * b.norm()
    return gradients[0], gradients[1]


def in_float64(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of this name, with float64 in place of float32 during a test; skips the test if it is not installed."""
    module = pytest.importorskip(name, reason=f"is in the extra `{extra}`")
    monkeypatch.setattr(module, "torch", Float64())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for key, value in list(vars(module).items()):
        if inspect.isfunction(value) and (unwrapped := inspect.unwrap(value)) is not value:
            monkeypatch.setattr(module, key, unwrapped)
    return module
