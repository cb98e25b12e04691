"""The command line: help is quick, bad input exits with 2 and one line, and nothing is left behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmu_dist.cli import main

JOB = str(Path(__file__).parents[1] / "jobs" / "train.yaml")


def test_help_imports_nothing_heavy():
    code = "import sys, lmu_dist.cli; print([m for m in ('torch', 'ray', 'mlflow', 'deepspeed') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", JOB, "train.lerning_rate=1"], "did you mean train.learning_rate?"),
        (["train", JOB, "train.tokens=x"], "train.tokens"),
        (["train", "missing.yaml"], "cannot read missing.yaml"),
        (["train", JOB, "data.source=files", "data.files=[none/*.txt]"], "no file matches none/*.txt"),
        (["prepare", JOB, "data.tokenizer.kind=file", "data.tokenizer.path=none.json"], "no tokenizer at none.json"),
        (["generate", "no-such-run"], "no-such-run"),
        (["export", "no-such-run", "out"], "no-such-run"),
    ],
)
def test_bad_input_exits_with_two(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("lmu-dist:")]) == 1
    assert not (tmp_path / "out").exists()
    assert not any(p.name.startswith("lmu-") for p in tmp_path.rglob("*"))
    assert time.monotonic() - began < 60
