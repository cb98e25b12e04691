"""Families from one file, from configuration to report on Ray: a new built-in family in a copy of the package, a user's."""

import json
import shutil
from pathlib import Path

import pytest
from commands import run_commands

from lmu_dist.cli import main
from lmu_dist.models.family_source import FAMILY_CODE
from lmu_dist.models.registry import built_in

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/gated_linear_attention.py:GatedLinearAttention"
BUILT_IN = '''"""A family of the test."""

from typing import Any

from torch import nn

from lmu_dist.models.family import Family
from lmu_dist.models.mixers.attention import Attention
from lmu_dist.models.shape import Shape


class NoPositions(Family):
    """A transformer without position embedding."""

    version = 1
    title = "no positions"
    colour = "#123abc"
    d_model_multiple = 2

    def mixer(self, shape: Shape, options: Any) -> nn.Module:
        """Builds attention."""
        return Attention(shape.d_model, 2)
'''


@pytest.fixture(scope="module")
def folder(corpus_glob: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, with an additional family, the examples and a ladder."""
    folder = tmp_path_factory.mktemp("families")
    for name in ("lmu_dist", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "lmu_dist" / "models" / "families" / "no_positions.py").write_text(BUILT_IN)
    tree = {
        "experiment": "own-family",
        "data": {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}},
        "train": {"batch_tokens": 256, "sequence_tokens": 32, "schedule": "wsd", "warmup_tokens": 256, "eval_tokens": 512},
        "ladder": {"families": [EXAMPLE, "no_positions", *built_in()], "n_params": [3000], "tokens": [5120]},
        "cluster": {"n_workers": 1},
    }
    (folder / "job.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.timeout(600)
def test_new_families_in_plan_ladder_report_and_figures(folder: Path, capsys: pytest.CaptureFixture[str]):
    environment = {"PYTHONPATH": str(folder)}
    outputs = run_commands(folder, environment, "plan job.json --json", "ladder job.json --json")
    planned, cells = (json.loads(output)["cells"] for output in outputs)
    assert {cell["family"] for cell in planned} == {"gated_linear_attention", "no_positions", *built_in()}
    assert {(cell["family"], cell["status"]) for cell in cells} == {(c["family"], "complete") for c in planned}
    versions = {cell["family"]: cell["family_version"] for cell in cells}
    assert (versions["no_positions"], versions["lmu"], len(versions["gated_linear_attention"])) == ("1", "1", 12)
    # Changed comments and docstrings do not repeat any run. (test_cell shows that a raised version does.)
    for path in ("models/lm.py", "models/families/lmu.py", "train/engine.py", "launch/worker.py"):
        file = folder / "lmu_dist" / path
        file.write_text(file.read_text().replace('"""', '"""Edited. ', 1) + "# a comment\n")
    run = next(cell["folder"] for cell in cells if cell["family"] == "gated_linear_attention")
    output, _, text, _ = run_commands(
        folder,
        environment,
        "ladder job.json --json",
        "report own-family -o report",
        f"generate {run} --tokens 3 --family {EXAMPLE}",
        f"export {run} exported --family {EXAMPLE}",
    )
    assert all(cell["was_done"] for cell in json.loads(output)["cells"])
    page = (folder / "report" / "report.html").read_text()
    assert "no positions" in page
    assert "gated linear attention" in page
    assert "--family-no-positions: #123abc" in page
    assert "var(--family-gated-linear-attention)" in (page[page.index("<svg") :])
    assert (Path(run) / FAMILY_CODE).read_text() == (folder / "examples" / "gated_linear_attention.py").read_text()
    assert text
    assert main(["generate", str(folder / "exported")]) == 2
    assert "give --family path/to/file.py:CLASS" in capsys.readouterr().err
