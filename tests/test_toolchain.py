"""Builds of torch extensions, really compiled: one who was killed while building keeps nobody waiting."""

import multiprocessing
import time
from pathlib import Path

import psutil
import pytest
from building import build

SOURCE = "extern int small() { return 1; }"  # a plain library without torch's headers is built in a second


def started(folder: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=build, args=(folder,))
    process.start()
    return process


def test_a_lock_that_was_left_behind_is_not_waited_for(tmp_path: Path):
    (tmp_path / "small.cpp").write_text(SOURCE)
    (tmp_path / "lock").touch()  # torch's own baton, as a killed process leaves it
    process = started(tmp_path)
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "small.so").exists()


def test_who_is_killed_while_building_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "small.cpp").write_text(SOURCE)
    slow = tmp_path / "slow-compiler"
    slow.write_text(f'#!/bin/sh\ntouch {tmp_path}/began\nsleep 3\nexec g++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    processes = started(tmp_path), started(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    [builder] = [p for p in processes if psutil.Process(p.pid).children()]  # ninja
    builder.kill()
    [other] = [p for p in processes if p is not builder]
    other.join(60)
    assert other.exitcode == 0
    assert (tmp_path / "small.so").exists()
