"""Part `suite`: the tests of the models and of the engine that need a GPU, by pytest if it is installed. Called by part.py."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from gpu.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
SELECTED, TOY_SELECTED = "triton or cuda or gpu", "lmu_on_a_cpu or parallel_scan"
TESTS = ("tests/models", "tests/train/test_engine.py")
# The project's own options need packages that a GPU machine may not have: beartype, pytest-timeout.
OPTIONS = ["-q", "-o", "addopts=", "-o", "filterwarnings=", "--import-mode=importlib", "-p", "no:cacheprovider"]


def run(recorder: Recorder) -> None:
    """Runs the tests, in several processes with pytest-xdist, and counts the results."""
    if importlib.util.find_spec("pytest") is None:
        recorder.note("pytest is not installed: the tests did not run")
        return
    selected = TOY_SELECTED if recorder.device.type == "cpu" else SELECTED
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", *OPTIONS, f"--junitxml={xml}", "-k", selected, *TESTS]
        if importlib.util.find_spec("xdist") is not None and recorder.device.type == "cuda":
            command += ["-n", str(min(8, len(os.sched_getaffinity(0))))]  # a process compiles kernels one after the other
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        if not xml.exists():
            recorder.fail(f"pytest ended with {done.returncode} and without results")
            return
        [totals] = ElementTree.parse(xml).getroot().iter("testsuite")
        counts = {name: int(totals.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        recorder.row("tests", selected=selected, **counts, seconds=float(totals.get("time", 0)))
        recorder.expect(done.returncode == 0, f"pytest ended with {done.returncode}: {counts}")
        recorder.expect(counts["tests"] > counts["skipped"], "no test ran")
        for case in totals.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                recorder.fail(f"{case.get('classname')}::{case.get('name')}")
