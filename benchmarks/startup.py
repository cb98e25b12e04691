"""Section `startup` of speed.py: start-up times, each measured in new processes.

It times `lmu-dist --help`, the import of torch and of the models, and the kernel's first compile and later loads in a folder of
its own. Called by section.py.
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
# Prints the seconds of loading the library, or "none" if it cannot be built.
KERNEL = """
import time
from lmu_dist.models.kernels import compiled
began = time.perf_counter()
made = compiled.library()
print(time.perf_counter() - began if made else "none")
"""
HAS_KERNEL = "import importlib.util as u; print(u.find_spec('lmu_dist.models.kernels') is not None)"


def process(code: str, **environment: str) -> tuple[float, str]:
    """Runs code in a new Python process. Returns its seconds and the last line it printed."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{code!r} failed: {(done.stderr.strip().splitlines() or ['no output on stderr'])[-1]}")
    return time.perf_counter() - began, (done.stdout.strip().splitlines() or [""])[-1]


def measure(device: torch.device, quick: bool) -> Section:
    """Runs the section. The device makes no difference."""
    repeats, notes = 1 if quick else 5, list[str]()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for i in range(repeats + 1):
        for name, code in COMMANDS.items():
            spent = process(code)[0]
            if i or quick:  # the first round also reads files from disk
                times[name].append(spent)
    rows: list[Row] = [{"start": name, "seconds": statistics.median(spent)} for name, spent in times.items()]
    if process(HAS_KERNEL)[1] != "True":
        return Section({"startup": rows}, ["kernel: not in this revision"])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [process(KERNEL, TORCH_EXTENSIONS_DIR=folder)[1] for _ in range(1 + repeats)]
    if "none" in outputs:
        notes.append("kernel: cannot be compiled on this machine")
    else:
        rows.append({"start": "kernel, first compile", "seconds": float(outputs[0])})
        rows.append({"start": "kernel, later load", "seconds": statistics.median(map(float, outputs[1:]))})
    return Section({"startup": rows}, notes)
