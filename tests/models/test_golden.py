"""Golden losses of the families in float64. A change that moves them changes results and needs a new version of the family.

The steps are plain gradient descent, written here, so the losses depend only on the models. Rounding moves them by far less
than the tolerance: another order of a sum or another processor passes, another epsilon fails. To update them after raising a
version: PYTHONPATH=tests/models python tests/models/test_golden.py
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.mixers.attention import Attention
from lmu_dist.models.registry import built_in, find, version_of
from lmu_dist.models.sizing import shape_for
from lmu_dist.train import VERSION

GOLDEN = Path(__file__).parents[1] / "golden"
VOCAB, LENGTH, ROWS, STEPS = 61, 16, 8, 8
TOLERANCE = 1e-9  # relative
SHARED = f"{Path(__file__).parent / 'golden_family.py'}:Shared"
UPDATE = "PYTHONPATH=tests/models python tests/models/test_golden.py"


def losses(family: str) -> list[float]:
    """Losses of STEPS steps of gradient descent from seeded weights. Every step has length 0.3."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # for the initial weights: random numbers in float32 depend on the processor
    try:
        model = LanguageModel(shape_for(family, 3000, vocab_tokens=VOCAB, sequence_tokens=LENGTH), seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (STEPS, ROWS, LENGTH + 1)))
    results = list[float]()
    for rows in tokens:
        loss = model(rows[:, :-1], rows[:, 1:]).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= 0.3 * gradient / norm
        results.append(loss.item())
    return results


def difference(name: str, version: Any, found: list[float]) -> float:
    """The largest relative difference to the golden losses of a version; those of other versions stay in the file."""
    path = GOLDEN / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    assert str(version) in stored, f"there are no golden losses of version {version} of {name}; write them with {UPDATE}"
    return max(abs(a - b) / b for a, b in zip(found, stored[str(version)], strict=True))


def key_of(family: str) -> str:
    """The key of a family's losses in its file: the versions of the family, of its parts and of the training."""
    return f"{version_of(find(family), {})} with train.VERSION {VERSION}"


def check_shared() -> None:
    """Raises an AssertionError with instructions if what all families share computes something else."""
    moved = difference("shared", VERSION, losses(SHARED))
    assert moved < TOLERANCE, (
        f"the parts that all families share (models/lm.py, head.py, mixers/feed_forward.py) changed losses by {moved:.1e} "
        f"(relative). If this was not intended, fix the code. If it was, raise VERSION in lmu_dist/train/__init__.py to "
        f"{VERSION + 1} (finished runs of every family are then trained again), give the reason in CHANGELOG.md, and update "
        f"the golden losses with {UPDATE}"
    )


def check(family: str) -> None:
    """Raises an AssertionError with instructions if the losses of a family have changed."""
    version = find(family).version
    moved = difference(family, key_of(family), losses(family))
    if moved >= TOLERANCE:
        check_shared()  # the cause, if it fails too
    assert moved < TOLERANCE, (
        f"the losses of {family} changed by {moved:.1e} (relative). If this was not intended, fix the code. If it was, raise "
        f"`version` in lmu_dist/models/families/{family}.py to {int(version) + 1} (finished runs of this family are then "
        f"trained again), give the reason in CHANGELOG.md, and update the golden losses with {UPDATE}"
    )


@pytest.mark.parametrize("family", built_in())
def test_golden_losses(family: str):
    check(family)


def test_golden_losses_of_what_all_families_share():
    check_shared()


def test_changed_losses_of_a_family_name_its_version(monkeypatch: pytest.MonkeyPatch):
    attention = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x: attention(self, x) * (1 + 1e-6))
    with pytest.raises(AssertionError, match=r"raise `version` in lmu_dist/models/families/transformer.py to 2"):
        check("transformer")


def test_another_epsilon_of_the_norms_names_the_version_that_all_share(monkeypatch: pytest.MonkeyPatch):
    original = torch.nn.LayerNorm.__init__

    def other_epsilon(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.eps = 2e-5

    monkeypatch.setattr(torch.nn.LayerNorm, "__init__", other_epsilon)
    for checked in (check_shared, partial(check, "transformer")):
        with pytest.raises(AssertionError, match=r"raise VERSION in lmu_dist/train/__init__.py to 2"):
            checked()


def test_another_order_of_a_sum_passes(monkeypatch: pytest.MonkeyPatch):
    linear, changed = torch.nn.functional.linear, list[bool]()

    def in_parts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        first, second, third = (linear(x[..., i::3], weight[:, i::3]) for i in range(3))
        result = (third + first if bias is None else third + first + bias) + second
        changed.append(not torch.equal(result, linear(x, weight, bias)))
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", in_parts)
    check("lmu")
    assert any(changed)  # in the losses the last bits may agree again


def update(name: str, version: Any, found: list[float]) -> None:
    """Adds the losses of a new version. Raises SystemExit if the version has others: it was not raised."""
    path = GOLDEN / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if str(version) in stored and difference(name, version, found) >= TOLERANCE:
        raise SystemExit(f"{path} has other losses of version {version}: raise the version first")
    path.write_text(json.dumps({str(version): found} | stored, indent=1) + "\n")


if __name__ == "__main__":
    update("shared", VERSION, losses(SHARED))
    for name in built_in():
        update(name, key_of(name), losses(name))
