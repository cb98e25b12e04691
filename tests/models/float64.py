"""Makes modules of transformers and fla the oracles of tests: in float64, and by their torch functions.

They compute decays, norms and recurrences in float32 at any precision, and take kernels for GPUs where those are installed.
"""

import inspect
from collections.abc import Sequence
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


def in_float64(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of this name, with float64 in place of float32 during a test; skips the test if it is not installed."""
    module = pytest.importorskip(name, reason=f"is in the extra `{extra}`")
    monkeypatch.setattr(module, "torch", Float64())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for key, value in list(vars(module).items()):
        if inspect.isfunction(value) and (unwrapped := inspect.unwrap(value)) is not value:
            monkeypatch.setattr(module, key, unwrapped)
    return module
