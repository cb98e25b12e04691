"""Runs several commands of lmu-dist in one new process: its imports take longer than most commands."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SEVERAL_COMMANDS = """
import contextlib, io, json, sys

from lmu_dist.cli import main

for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(words)
    print(json.dumps([code, output.getvalue()]), flush=True)
"""


def run_commands(folder: Path, environment: Mapping[str, str], *commands: str) -> list[str]:
    """The outputs of commands that are run in a folder. All must succeed. Imports are from there only by PYTHONPATH."""
    process = [sys.executable, "-P", "-c", SEVERAL_COMMANDS, json.dumps([line.split() for line in commands])]
    done = subprocess.run(process, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=400)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, _ in results] == [0] * len(commands), done.stderr[-3000:]
    return [output for _, output in results]
