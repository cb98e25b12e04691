"""Runs one section of speed.py: `python section.py MODULE:FUNCTION DEVICE quick|full OUT.json`.

Each section runs in a process of its own, because peak memory, caches and torch settings persist in a process, and because the
lmu_dist of another revision may be measured: PYTHONPATH selects it.
"""

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import lmu_dist

# Share of the CPU time above which other processes get a note: a preempted thread delays all threads that wait for it.
DISTURBED = 0.03
STAT = Path("/proc/stat")


def busy_seconds() -> float | None:
    """CPU seconds of all processes on this machine since boot. None if there is no /proc/stat."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Writes the section's results, the path of the measured lmu_dist, and the share of CPU time that other processes used."""
    target, device, pace, out = sys.argv[1:]
    module, function = target.split(":")
    busy, before = busy_seconds(), os.times()
    found = getattr(importlib.import_module(module), function)(torch.device(device), pace == "quick")
    after, busy_now = os.times(), busy_seconds()
    others = None
    if busy is not None and busy_now is not None:
        own = sum(after[:4]) - sum(before[:4])
        others = max(0.0, busy_now - busy - own) / ((after.elapsed - before.elapsed) * (os.cpu_count() or 1))
        if others > DISTURBED:
            found.notes.append(f"other processes used {others:.0%} of the CPU time; measure again on an idle machine")
    record = asdict(found) | {"package": str(Path(lmu_dist.__file__).parent), "threads": torch.get_num_threads()}
    record |= {"others_share": others}
    Path(out).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
