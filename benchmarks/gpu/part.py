"""Runs one part of the check. Called by check.py.

python -m gpu.part MODULE ROWS.jsonl cpu|cuda full|toy|fast SEED SECONDS
"""

import importlib
import sys
from pathlib import Path

from gpu.recorder import Recorder


def main() -> None:
    """Runs the function `run` of a part's module."""
    module, path, device, pace, seed, seconds = sys.argv[1:]
    recorder = Recorder(Path(path), device, pace, int(seed), float(seconds))
    importlib.import_module(module).run(recorder)


if __name__ == "__main__":
    main()
