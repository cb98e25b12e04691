"""The check of lmu-dist on one GPU. Called by check.sh; README.md explains the parts and how to read the results.

Each part runs in a process of its own with a time limit. Results are written after every measurement, as JSON and as Markdown.
Exit code: 0 if all parts passed, else 1. A missed target fails no part.
"""

import argparse
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpu import table, targets

ROOT = Path(__file__).resolve().parents[2]


class Part(NamedTuple):
    """Module of a part, and its limits in seconds: on a GPU, and with toy sizes on a CPU."""

    module: str
    seconds: float
    toy_seconds: float


# The quick and decisive ones come first. Together they take at most 9 minutes on either device.
PARTS = {
    "card": Part("gpu.card", 30, 20),
    "operators": Part("gpu.operators", 60, 50),
    "modern": Part("gpu.modern", 80, 60),
    "steps": Part("gpu.steps", 100, 90),
    "engine": Part("gpu.engine", 50, 50),
    "road": Part("gpu.road", 110, 190),
    "mixers": Part("gpu.mixers", 60, 30),
    "suite": Part("gpu.suite", 50, 50),
}
DEVICES = {"cuda": "full", "cpu": "toy"}
POLL_SECONDS = 0.2
Record = dict[str, Any]


def git(*arguments: str) -> str | None:
    """Output of a git command in this checkout; None without git or a repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def empty_record(device: str, pace: str, seed: int, parts: Sequence[str]) -> Record:
    """The record before the first part. $COMMIT names the commit of a copy without a repository."""
    changed = git("status", "--porcelain")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or os.environ.get("COMMIT"),
        "dirty": None if changed is None else bool(changed),
        "command": " ".join(["check.sh", *parts]),
        "device": device,
        "toy": pace != "full",
        "seed": seed,
        "facts": {},
        "targets": [],
        "parts": {},
    }


def result_path(folder: Path, record: Record) -> Path:
    """A path without suffix and not yet taken: the date and the card."""
    card = re.sub(r"[^a-z0-9]+", "-", str(record["facts"].get("card", record["device"])).lower()).strip("-")
    name = f"{record['date'][:10]}-{card}"
    taken = {path.stem for path in folder.glob("*.json")}
    return folder / next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)


def run_part(name: str, record: Record, pace: str, log: Path, save: Callable[[], None]) -> None:
    """Runs a part until it ends or its time is over. Adds its results to the record as they come and calls `save` then."""
    limit = PARTS[name].toy_seconds if record["toy"] else PARTS[name].seconds
    part: Record = {"status": "running", "seconds": 0.0, "limit_seconds": limit, "failures": [], "notes": [], "tables": {}}
    record["parts"][name] = part
    began, n_read = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as output:
        rows = Path(folder) / "rows.jsonl"
        command = [
            sys.executable,
            "-m",
            "gpu.part",
            PARTS[name].module,
            str(rows),
            record["device"],
            pace,
            str(record["seed"]),
            str(limit),
        ]
        # Toy sizes gain nothing from threads, and lose much if other processes use the cores.
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if record["toy"] else {})
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                ended, part["seconds"] = process.poll() is not None, time.monotonic() - began
                lines = rows.read_text().splitlines(keepends=True) if rows.exists() else []
                new = [line for line in lines[n_read:] if line.endswith("\n")]
                n_read += len(new)
                for item in map(json.loads, new):
                    _add(record, part, item)
                if new:
                    save()
                if ended:
                    break
                if part["seconds"] > limit:
                    part["failures"].append(f"ran over its limit of {limit:.0f} s")
                    break
        finally:
            _kill(process)
    if process.returncode and process.returncode != -signal.SIGKILL:
        part["failures"].append(f"ended with exit code {process.returncode}: {_last_line(log)}")
    part["status"] = "failed" if part["failures"] else "passed"
    save()


def _add(record: Record, part: Record, item: Mapping[str, Any]) -> None:
    if "table" in item:
        part["tables"].setdefault(item["table"], []).append(item["row"])
    elif "fact" in item:
        record["facts"][item["fact"]] = item["value"]
    elif "note" in item:
        part["notes"].append(item["note"])
    else:
        part["failures"].append(item["failure"])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and all processes that it has started, such as Ray's."""
    if process.poll() is not None:
        return
    import psutil  # not at the top: the parts that come first should run without it

    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in started:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _last_line(path: Path) -> str:
    return next((line for line in reversed(path.read_text(errors="replace").splitlines()) if line.strip()), "no output")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", choices=sorted(DEVICES), default=os.environ.get("DEVICE", "cuda"))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT_DIR") or ROOT / "benchmarks/gpu/results"))
    parser.add_argument("--fast", action="store_true", help="with --device cpu: a small subset of the toy sizes, for a test")
    parser.add_argument("--seed", type=int, help="seed of all random inputs; default: a new one")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}")
    if given.device == "cuda":
        import torch  # takes seconds

        if not torch.cuda.is_available():
            parser.error("no CUDA device on this machine; set DEVICE=cpu for toy sizes without one")
    names = [name for name in PARTS if name == "card" or name in (given.parts or PARTS)]
    pace = "fast" if given.fast and given.device == "cpu" else DEVICES[given.device]
    given.out.mkdir(parents=True, exist_ok=True)
    seed = secrets.randbelow(2**31) if given.seed is None else given.seed
    record = empty_record(given.device, pace, seed, given.parts)
    path, log = given.out / ".check", given.out / ".check.log"
    log.unlink(missing_ok=True)
    for name in names:
        print(f"{name} ..", file=sys.stderr, flush=True)
        run_part(name, record, pace, log, partial(table.write, record, path))
        if name == "card":  # its results name the files
            unnamed, path = path, result_path(given.out, record)
            for suffix in (".json", ".md"):
                unnamed.with_name(unnamed.name + suffix).rename(path.with_name(path.name + suffix))
        part = record["parts"][name]
        print(
            f"{name}: {part['status']} after {part['seconds']:.0f} s",
            *part["failures"],
            sep="\n  ",
            file=sys.stderr,
            flush=True,
        )
        if not record["toy"]:
            record["targets"] = targets.judge(record["parts"])
            table.write(record, path)
    print(path.with_name(path.name + ".md").read_text())
    failed = [name for name in names if record["parts"][name]["status"] != "passed"]
    print(f"results: {path}.json, {path}.md; output of the parts: {log}", file=sys.stderr)
    print(
        f"{len(names) - len(failed)} passed, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}", file=sys.stderr
    )
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the running part is ended too
    sys.exit(main())
