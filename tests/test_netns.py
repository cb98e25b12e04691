"""Runs tests/netns.py: a ladder on a cluster of network namespaces, with failures of nodes, the network and the head."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("arguments", [[], ["--postgres", "wrong-password"]])
def test_ladder_in_network_namespaces_gives_the_same_results_after_failures(arguments: list[str]):
    done = subprocess.run([sys.executable, Path(__file__).with_name("netns.py"), *arguments], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
