"""The Makefile refuses a Python of another version, also where an environment is installed already."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("version", "is_supported", "message"),
    [
        ("3.13.0", False, "lmu-dist needs Python 3.11 or 3.12, and ./other is none of them (Python 3.13.0); run make PYTHON="),
        ("3.12.1", True, ".venv has Python 3.11.7, and ./other is Python 3.12.1; run make clean first, or leave PYTHON out"),
    ],
)
def test_another_python_is_refused(version: str, is_supported: bool, message: str, tmp_path: Path):
    shutil.copy(Path(__file__).parents[1] / "Makefile", tmp_path)
    for name, its_version, code in (("other", version, int(not is_supported)), (".venv/bin/python", "3.11.7", 0)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$1" = -V ] && echo "Python {its_version}" && exit 0\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    done = subprocess.run(["make", "setup", "PYTHON=./other"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()[: len(message)]) == (2, message)
