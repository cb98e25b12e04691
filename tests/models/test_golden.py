"""Golden losses of the families, in float64: a change that moves them is a change of meaning, and needs a new version.

They depend on the families alone: the steps are plain gradient descent, written here. Rounding moves them by far less than the
tolerance, so a sum in another order or another processor passes, and an epsilon does not. To write them anew after raising a
version: PYTHONPATH=tests/models python tests/models/test_golden.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.registry import built_in, find
from lmu_dist.models.sizing import shape_for

GOLDEN = Path(__file__).parents[1] / "golden"
VOCAB, LENGTH, ROWS, STEPS = 61, 16, 8, 8
TOLERANCE = 1e-9  # relative


def losses(family: str) -> list[float]:
    """Losses of some steps of gradient descent from the seeded weights, each of length 0.3 in the space of weights."""
    torch.set_num_threads(1)
    torch.set_default_dtype(
        torch.float64
    )  # of the weights as they are drawn: random numbers in float32 depend on the processor
    try:
        model = LanguageModel(shape_for(family, 3000, vocab_tokens=VOCAB, sequence_tokens=LENGTH), seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (STEPS, ROWS, LENGTH + 1)))
    found = list[float]()
    for rows in tokens:
        loss = model(rows[:, :-1], rows[:, 1:]).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= 0.3 * gradient / norm
        found.append(loss.item())
    return found


def check(family: str, version: Any, stored: dict[str, Any], found: list[float]) -> None:
    """Raises AssertionError that says what to do."""
    anew = "PYTHONPATH=tests/models python tests/models/test_golden.py"
    file = f"lmu_dist/models/families/{family}.py"
    missing = f"there are no golden losses of version {version} of {family}; write them: {anew}"
    assert version == stored.get("version"), missing
    apart = max(abs(a - b) / b for a, b in zip(found, stored["losses"], strict=True))
    assert apart < TOLERANCE, (
        f"the losses of {family} moved by {apart:.1e}: what it computes has changed. If that was not meant, mend it. "
        f"If it was, raise `version` in {file} to {version + 1} (finished runs of this family are then trained again), say why "
        f"in CHANGELOG.md, and write the golden losses anew: {anew}"
    )


@pytest.mark.parametrize("family", built_in())
def test_golden_losses(family: str):
    path = GOLDEN / f"{family}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    check(family, find(family).version, stored, losses(family) if stored else [])


def test_a_change_of_meaning_names_the_version_to_raise(monkeypatch: pytest.MonkeyPatch):
    family, stored = "transformer", json.loads((GOLDEN / "transformer.json").read_text())
    original = torch.nn.LayerNorm.__init__

    def other_epsilon(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.eps = 2e-5

    monkeypatch.setattr(torch.nn.LayerNorm, "__init__", other_epsilon)
    with pytest.raises(AssertionError, match=r"raise `version` in lmu_dist/models/families/transformer.py to 2"):
        check(family, find(family).version, stored, losses(family))


def test_the_order_of_a_sum_is_no_change_of_meaning(monkeypatch: pytest.MonkeyPatch):
    stored, linear, plain = json.loads((GOLDEN / "lmu.json").read_text()), torch.nn.functional.linear, losses("lmu")

    def in_halves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x[..., 1::2], weight[:, 1::2], bias) + linear(x[..., ::2], weight[:, ::2])

    monkeypatch.setattr(torch.nn.functional, "linear", in_halves)
    found = losses("lmu")
    assert found != plain
    check("lmu", find("lmu").version, stored, found)


if __name__ == "__main__":
    for name, made in built_in().items():
        content = json.dumps({"version": made.version, "losses": losses(name)}, indent=1)
        (GOLDEN / f"{name}.json").write_text(content + "\n")
