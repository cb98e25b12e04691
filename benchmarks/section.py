"""Runs one section in a process of its own: `python section.py MODULE:FUNCTION DEVICE quick|full OUT.json`; called by speed.py.

A process of its own, since peak memory, caches and settings of torch stay with a process, and since another revision's
lmu_dist is another program: PYTHONPATH says whose it is.
"""

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import lmu_dist

DISTURBED = 0.03  # of all processors: a thread that waits for another which is not running waits for all of its turn
STAT = Path("/proc/stat")


def busy_seconds() -> float | None:
    """What all processors of the machine have worked since it started, for anybody."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Writes what the section found, whose lmu_dist it was, and what share of the processors others had meanwhile."""
    place, device, pace, out = sys.argv[1:]
    module, function = place.split(":")
    busy, before = busy_seconds(), os.times()
    found = getattr(importlib.import_module(module), function)(torch.device(device), pace == "quick")
    after, busy_now = os.times(), busy_seconds()
    others = None
    if busy is not None and busy_now is not None:
        mine = sum(after[:4]) - sum(before[:4])
        others = max(0.0, busy_now - busy - mine) / ((after.elapsed - before.elapsed) * (os.cpu_count() or 1))
        if others > DISTURBED:
            found.notes.append(f"others had {others:.0%} of the processors meanwhile; measure again on an idle machine")
    record = asdict(found) | {"package": str(Path(lmu_dist.__file__).parent), "threads": torch.get_num_threads()}
    record |= {"others_share": others}
    Path(out).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
