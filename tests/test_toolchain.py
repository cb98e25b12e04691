"""Tests of extension builds with a real compiler: a killed process blocks no other, and copies of the package share a build."""

import multiprocessing
import shutil
import time
from pathlib import Path

import psutil
import pytest
from build_extension import build

from lmu_dist.models.kernels import compiled

SOURCE = "extern int small() { return 1; }"  # builds in a second, because it does not include torch's headers


def start_build(folder: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=build, args=(folder,))
    process.start()
    return process


def test_stale_lock_file_of_torch_is_ignored(tmp_path: Path):
    (tmp_path / "small.cpp").write_text(SOURCE)
    (tmp_path / "lock").touch()  # torch's lock file, as a killed process leaves it
    process = start_build(tmp_path)
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "small.so").exists()


def test_waiting_process_builds_after_the_builder_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "small.cpp").write_text(SOURCE)
    slow = tmp_path / "slow-compiler"
    # Only the first call is slow. It compiles nothing, so that what remains of the killed build cannot disturb the other one.
    slow.write_text(f'#!/bin/sh\nmkdir {tmp_path}/began 2>/dev/null && sleep 3 && exit 1\nexec g++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    processes = start_build(tmp_path), start_build(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    [builder] = [p for p in processes if psutil.Process(p.pid).children()]  # ninja
    builder.kill()
    [other] = [p for p in processes if p is not builder]
    other.join(60)
    assert other.exitcode == 0
    assert (tmp_path / "small.so").exists()


def test_two_copies_of_the_package_share_the_library_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = compiled._build()
    ended = built.stat().st_mtime_ns
    for source in compiled.SOURCES:
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(compiled, "SOURCES", [tmp_path / source.name for source in compiled.SOURCES])
    assert compiled._build() == built
    assert built.stat().st_mtime_ns == ended
    with open(tmp_path / "convolve.cpp", "a") as file:
        file.write("// another version\n")
    monkeypatch.setattr(compiled.build, "shared_library", lambda *_: None)  # as if it built
    assert compiled._build() != built
