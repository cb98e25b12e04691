"""Golden losses of the training, in float64: a change of optimizer, schedule, data order or defaults needs a new version.

They depend on no family: a table of logits is trained by the real engine, loop, schedule and evaluation. To write them anew
after raising train.VERSION: PYTHONPATH=tests:tests/train python tests/train/test_golden.py
"""

import json
from pathlib import Path
from typing import Any

import golden_task
import pytest
from spawn_ranks import spawn_ranks

from lmu_dist.train import VERSION

GOLDEN = Path(__file__).parents[1] / "golden" / "train.json"
ANEW = "PYTHONPATH=tests:tests/train python tests/train/test_golden.py"
TOLERANCE = 1e-9  # relative


def check(found: dict[str, list[float]]) -> None:
    """Raises AssertionError that says what to do."""
    stored = json.loads(GOLDEN.read_text())
    assert stored["version"] == VERSION, f"there are no golden losses of train.VERSION {VERSION}; write them: {ANEW}"
    for name, expected in stored["values"].items():
        apart = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found[name], expected, strict=True))
        assert apart < TOLERANCE, (
            f"{name}: the training moved by {apart:.1e}: what it computes has changed. If that was not meant, mend it. "
            f"If it was, raise VERSION in lmu_dist/train/__init__.py to {VERSION + 1} (finished runs of every family are then "
            f"trained again), say why in CHANGELOG.md, and write the golden losses anew: {ANEW}"
        )


CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "beta2": {"beta2": 0.99901},
    "eps": {"eps": 2e-8},
    "clip_norm": {"clip_norm": 1.01},
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[float]]]:
    return spawn_ranks(1, golden_task.trainings, CHANGES)


def test_golden_training(found):
    check(found["none"])


@pytest.mark.parametrize("change", ["beta2", "eps", "clip_norm"])
def test_a_change_of_meaning_names_the_version_to_raise(found, change: str):
    with pytest.raises(AssertionError, match=r"raise VERSION in lmu_dist/train/__init__.py to 2"):
        check(found[change])


if __name__ == "__main__":
    values = spawn_ranks(1, golden_task.trainings, {"none": {}})["none"]
    GOLDEN.write_text(json.dumps({"version": VERSION, "values": values}, indent=1) + "\n")
