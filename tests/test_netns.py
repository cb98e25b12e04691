"""Runs tests/netns.py: a cluster in network namespaces, and what breaks in one."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("arguments", [[], ["--postgres", "wrong-password"]])
def test_a_ladder_in_network_namespaces_ends_with_the_same_table_whatever_breaks(arguments: list[str]):
    done = subprocess.run([sys.executable, Path(__file__).with_name("netns.py"), *arguments], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
