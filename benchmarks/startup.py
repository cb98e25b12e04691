"""Section `startup` of speed.py: what is waited for before anything runs, each in fresh processes.

`lmu-dist --help`, the import of the models (beside torch's alone), and the kernel's first compile and later loads, in a folder
of its own. Called by section.py.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from measure import Row, Section

COMMANDS = {
    "python": "pass",
    "import torch": "import torch",
    "import lmu_dist.models.lm": "import lmu_dist.models.lm",
    "lmu-dist --help": "import sys; from lmu_dist.cli import main; sys.argv = ['lmu-dist', '--help']; sys.exit(main())",
}
# Says what the library alone took, and whether there is one.
KERNEL = """
import time
from lmu_dist.models.kernels import compiled
began = time.perf_counter()
made = compiled.library()
print(time.perf_counter() - began if made else "none")
"""
HAS_KERNEL = "import importlib.util as u; print(u.find_spec('lmu_dist.models.kernels') is not None)"


def process(code: str, **environment: str) -> tuple[float, str]:
    """Seconds of a Python process, and the last line it printed."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{code!r} failed: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}")
    return time.perf_counter() - began, (done.stdout.strip().splitlines() or [""])[-1]


def measure(device: torch.device, quick: bool) -> Section:
    """The section; the same on every device."""
    repeats, notes = 1 if quick else 5, list[str]()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for i in range(repeats + 1):
        for name, code in COMMANDS.items():
            spent = process(code)[0]
            if i or quick:  # the first round reads files that were not in memory
                times[name].append(spent)
    rows: list[Row] = [{"start": name, "seconds": statistics.median(spent)} for name, spent in times.items()]
    if process(HAS_KERNEL)[1] != "True":
        return Section({"startup": rows}, ["kernel: not in this revision"])
    with tempfile.TemporaryDirectory() as folder:
        said = [process(KERNEL, TORCH_EXTENSIONS_DIR=folder)[1] for _ in range(1 + repeats)]
    if "none" in said:
        notes.append("kernel: cannot be compiled here")
    else:
        rows.append({"start": "kernel, first compile", "seconds": float(said[0])})
        rows.append({"start": "kernel, later load", "seconds": statistics.median(map(float, said[1:]))})
    return Section({"startup": rows}, notes)
