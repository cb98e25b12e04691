"""Tests of process pools: no worker outlives its parent or an exception of the block."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lmu_dist import pools

PARENT = """
import os, time
from lmu_dist.pools import process_pool
from multiprocessing import Process
if __name__ == "__main__":
    with process_pool(2) as pool:
        pids = {future.result() for future in [pool.submit(os.getpid) for _ in range(8)]}
        print(*pids, flush=True)
        for _ in range(2):
            pool.submit(time.sleep, 1000)  # one busy worker at least
        time.sleep(1000)
"""


def wait_until_gone(pids: list[int], seconds: float = 5) -> list[int]:
    deadline = time.monotonic() + seconds
    while alive := [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(number: signal.Signals, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline()
    children = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
    assert len(children) >= 2
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=10)
    assert wait_until_gone(children) == []
    assert "SpawnProcess" not in errors  # no traceback of a worker


def test_exception_ends_busy_workers():
    pids = []

    def fail() -> None:
        with pools.process_pool(1) as pool:
            pids.append(pool.submit(os.getpid).result())
            pool.submit(time.sleep, 1000)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert wait_until_gone(pids) == []
