"""Builds of C++ kernels with a real compiler: a killed process blocks no other, and copies of the package share a library."""

import multiprocessing
import shutil
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lmu_dist.models.kernels import build, compiled


def compiles(process: multiprocessing.process.BaseProcess) -> bool:
    """Whether a process has started the compiler for a source, not only asked for its version."""
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if "-c" in child.cmdline():
                return True
    return False


def test_waiting_process_builds_after_the_builder_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, library, slow = tmp_path / "small.cpp", tmp_path / "built" / "small.so", tmp_path / "slow-compiler"
    source.write_text("int small() { return 1; }")
    # Only the first compilation is slow. It compiles nothing, so that what remains of it cannot disturb the other one.
    began = f'[ "$1" = -c ] && mkdir {tmp_path}/began 2>/dev/null && sleep 3 && exit 1'
    slow.write_text(f'#!/bin/sh\n{began}\nexec c++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=build.shared_library, args=(library, [source], ())) for _ in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    [builder] = filter(compiles, processes)
    builder.kill()
    [other] = [p for p in processes if p is not builder]
    other.join(60)
    assert other.exitcode == 0
    assert library.exists()


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
