"""What a ladder costs beside its steps: `python benchmarks/run_groups.py [CONFIG] [key=value ...]`, by default the quickstart.

Runs the ladder in a temporary folder and prints one JSON object: wall seconds of the command and of the same command again; the
sum of the seconds of all training steps, each once; the seconds from the end of the last step of a trunk to the start of the
first step of the next one of the same group of workers, and between two cells of a trunk; the seconds of the first steps of
trunks, which take longer than others, since memory is new; and the private memory (USS) of the processes that a live trial has
on the head. Run it on an idle machine.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from lmu_dist import records
from lmu_dist.tracking.store import default_uri

ROOT = Path(__file__).parent.parent
TRIAL_PROCESSES = ("ImplicitFunc", "TrainController", "SynchronizationActor", "PlacementGroupCleaner", "DatasetManager")


class CellTimes(NamedTuple):
    """When a cell began its first and ended its last step, in seconds since 1970, and the seconds of the steps it took itself.

    `workers` is the name of the group of workers that took them.
    """

    trunk: str
    workers: str
    first: float
    last: float
    first_step_seconds: float
    step_seconds: float


def cell_times(storage: Path) -> list[CellTimes]:
    """The times of all cells, by their first steps."""
    found = list[CellTimes]()
    for path in storage.glob("*/*/record.json"):
        record = json.loads(path.read_text())
        entries = [json.loads(line) for line in (path.parent / "metrics_log.jsonl").read_text().splitlines()]
        steps = [e for e in entries if e["kind"] == "metrics" and records.TRAIN_LOSS in e["values"]]
        tags = {name: value for e in entries if e["kind"] == "tags" for name, value in e["values"].items()}
        # The seconds of a record include those of the steps before the branch point.
        own_share = (record["steps"] - record["fork_step"]) / record["steps"]
        seconds = record["training_seconds"] * own_share
        first_seconds = record["batch_tokens"] / steps[0]["values"][records.TOKENS_PER_SECOND]  # a step is logged at its end
        first, last = steps[0]["time_ms"] / 1000 - first_seconds, steps[-1]["time_ms"] / 1000
        trunk, workers = path.parent.parent.name, tags["lmu.worker_group"]
        found.append(CellTimes(trunk, workers, first, last, first_seconds, seconds))
    return sorted(found, key=lambda cell: cell.first)


def gaps(cells: list[CellTimes]) -> dict[str, list[float]]:
    """Seconds between trunks of a group of workers, of the first steps after these, and between cells of a trunk.

    Trunks of a group do not overlap.
    """
    found, of_group = defaultdict[str, list[float]](list), dict[str, CellTimes]()
    for cell in cells:
        if (before := of_group.get(cell.workers)) is not None:
            if before.trunk == cell.trunk:
                found["between_cells_seconds"].append(cell.first - before.last)
            else:
                found["between_trunks_seconds"].append(cell.first - before.last)
                found["first_step_seconds"].append(cell.first_step_seconds)
        of_group[cell.workers] = cell
    return found


def private_memory(pid: int) -> dict[str, int]:
    """The largest private memory, in bytes, of the processes of each kind that a trial has on the head."""
    found = dict[str, int]()
    with suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())
                for name in TRIAL_PROCESSES:
                    if f"ray::{name}" in title:
                        found[name] = max(found.get(name, 0), process.memory_full_info().uss)
    return found


def main() -> None:
    """Runs the ladder twice and prints the result."""
    config, overrides = (sys.argv[1:2] or [str(ROOT / "jobs" / "quickstart.yaml")])[0], sys.argv[2:]
    with tempfile.TemporaryDirectory(prefix="lmu-run-groups-") as temporary:
        folder, seconds, memory = Path(temporary), list[float](), dict[str, int]()
        environment = os.environ | {"MLFLOW_TRACKING_URI": default_uri(folder), "LMU_DIST_HOME": temporary}
        command = [sys.executable, "-m", "lmu_dist.cli", "ladder", str(Path(config).resolve()), f"storage={folder / 'runs'}"]
        for _ in range(2):
            began = time.perf_counter()
            with open(folder / "output", "wb") as output:
                ladder = subprocess.Popen([*command, *overrides], env=environment, cwd=folder, stdout=output, stderr=output)
                while ladder.poll() is None:
                    for name, uss in private_memory(ladder.pid).items():
                        memory[name] = max(memory.get(name, 0), uss)
                    time.sleep(0.05 if seconds else 1.0)
            seconds.append(time.perf_counter() - began)
            if ladder.returncode:
                sys.exit((folder / "output").read_text())
        cells = cell_times(folder / "runs")
        step_seconds = sum(cell.step_seconds for cell in cells)
        result: dict[str, Any] = {
            "n_cells": len(cells),
            "wall_seconds": seconds[0],
            "again_seconds": seconds[1],
            "step_seconds": step_seconds,
            "wall_over_steps": seconds[0] / step_seconds,
            **{name: {"median": statistics.median(times), "max": max(times)} for name, times in gaps(cells).items()},
            "trial_private_bytes": memory | {"sum": sum(memory.values())},
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
