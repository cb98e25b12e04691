"""A job that is submitted to a real Ray head: it runs the code that was sent, once."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lmu_dist.cli import main

# Ray raises warnings, and keeps sockets open until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def head() -> Iterator[str]:
    """A Ray head with a dashboard and a token, on free ports, started by `ray start`; the address of its dashboard."""
    ports = [_free_port() for _ in range(4)]
    names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    scratch = tempfile.mkdtemp(prefix="lmu")  # Ray's sockets need short paths
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_API_SERVER_ADDRESS")}
    environment["LMU_DIST_HOME"] = scratch
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            f"--temp-dir={scratch}",
            *options,
        ],
        env=environment,
        cwd=scratch,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        deadline = time.monotonic() + 60
        while not _listens(ports[1]) or not _listens(ports[2]):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.3)
        yield address
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_job_runs_on_a_cluster_with_the_submitted_code(head: str, folder: Path, monkeypatch, capfd):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # also undoes what main sets
    shutil.copytree(ROOT / "lmu_dist", folder / "lmu_dist", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "lmu_dist" / "__init__.py", "a") as file:
        file.write('print("the code that was sent")\n')
    shutil.copytree(ROOT / "examples", folder / "families")
    own = "model.family=families/gated_linear_attention.py:GatedLinearAttention"
    assert main(["submit", "job.yaml", own, "--address", head]) == 0
    for token, answer in (("f" * 64, "refuses the token"), ("", "there is no token")):
        refused = subprocess.run(
            [sys.executable, "-m", "lmu_dist.cli", "jobs", "list", "--address", head],
            env=os.environ | {"RAY_AUTH_TOKEN": token, "HOME": str(folder)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert answer in refused.stderr
        assert "RAY_AUTH_TOKEN" in refused.stderr
    assert main(["submit", "job.yaml", own, "--address", head, "--follow"]) == 0
    captured = capfd.readouterr()
    assert "not submitted again" in captured.out
    assert "the code that was sent" in captured.out
    assert "complete    gated_linear_attention-3k-25.6k-s0-" in captured.out
    assert main(["jobs", "list", "--json", "--address", head]) == 0
    [row] = json.loads(capfd.readouterr().out)
    assert (row["status"], row["experiment"]) == ("SUCCEEDED", "tests")
