"""Runs one section in a process of its own: `python section.py MODULE:FUNCTION DEVICE quick|full OUT.json`; called by speed.py.

A process of its own, since peak memory, caches and settings of torch stay with a process, and since another revision's
lmu_dist is another program: PYTHONPATH says whose it is.
"""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import lmu_dist


def main() -> None:
    """Writes what the section found, and whose lmu_dist it was."""
    place, device, pace, out = sys.argv[1:]
    module, function = place.split(":")
    found = getattr(importlib.import_module(module), function)(torch.device(device), pace == "quick")
    record = asdict(found) | {"package": str(Path(lmu_dist.__file__).parent), "threads": torch.get_num_threads()}
    Path(out).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
