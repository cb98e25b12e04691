"""Golden losses of the training in float64. A change of optimizer, schedule, data order or defaults needs a new train.VERSION.

They do not depend on a family: the engine, loop, schedule and evaluation train a table of logits. To update them after raising
train.VERSION: PYTHONPATH=tests:tests/train python tests/train/test_golden.py
"""

import json
from pathlib import Path
from typing import Any

import golden_task
import pytest
from spawn_ranks import spawn_ranks

from lmu_dist.train import VERSION

GOLDEN = Path(__file__).parents[1] / "golden" / "train.json"
UPDATE = "PYTHONPATH=tests:tests/train python tests/train/test_golden.py"
TOLERANCE = 1e-9  # relative


def check(found: dict[str, list[float]]) -> None:
    """Raises an AssertionError with instructions if the results of a training have changed."""
    stored = json.loads(GOLDEN.read_text())
    assert stored["version"] == VERSION, f"there are no golden losses of train.VERSION {VERSION}; write them with {UPDATE}"
    for name, expected in stored["values"].items():
        difference = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found[name], expected, strict=True))
        assert difference < TOLERANCE, (
            f"{name}: the training changed by {difference:.1e} (relative). If this was not intended, fix the code. If it was, "
            f"raise VERSION in lmu_dist/train/__init__.py to {VERSION + 1} (finished runs of all families are then trained "
            f"again), give the reason in CHANGELOG.md, and update the golden losses with {UPDATE}"
        )


CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "beta2": {"beta2": 0.99901},
    "eps": {"eps": 2e-8},
    "clip_norm": {"clip_norm": 1.01},
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, list[float]]]:
    return spawn_ranks(1, golden_task.trainings, CHANGES)


def test_golden_training(results):
    check(results["none"])


@pytest.mark.parametrize("change", ["beta2", "eps", "clip_norm"])
def test_changed_losses_give_an_error_with_the_version_to_raise(results, change: str):
    with pytest.raises(AssertionError, match=r"raise VERSION in lmu_dist/train/__init__.py to 2"):
        check(results[change])


if __name__ == "__main__":
    values = spawn_ranks(1, golden_task.trainings, {"none": {}})["none"]
    if json.loads(GOLDEN.read_text())["version"] == VERSION:
        check(values)  # the losses of a version never change: raise VERSION first
    GOLDEN.write_text(json.dumps({"version": VERSION, "values": values}, indent=1) + "\n")
