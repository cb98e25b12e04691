"""Benchmarks of speed and memory, as a JSON file and tables: `make bench`, about 20 minutes on two cores.

    python benchmarks/speed.py [SECTION ..] [--json bench.json] [--quick] [--device cuda] [--base REV [--rounds 2]]

Each section runs in a process of its own (section.py), with the malloc settings of workers unless the environment sets others.
With --base each section runs on both revisions in turn, with the benchmark code of this revision and the lmu_dist of either;
ratios are shown.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tables
import torch

from lmu_dist.launch.workers import MALLOC_SETTINGS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECTIONS = {
    "ceilings": "measure:ceilings",
    "mixers": "mixers:measure",
    "step": "steps:step",
    "families": "families:measure",
    "head": "steps:head",
    "loader": "steps:loader",
    "tokenizing": "tokenizing:measure",
    "generation": "generation:measure",
    "startup": "startup:measure",
}
Found = dict[str, Any]  # a section's tables and notes, or its error


def run_section(name: str, package: Path, device: str, quick: bool) -> Found:
    """Runs a section on the lmu_dist in `package` and returns its results, or {"error": ..} if it fails. Copies its stderr."""
    above = [package, HERE, ROOT / "tests" / "models"]
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, above), *([inherited] if inherited else [])])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, str(HERE / "section.py"), SECTIONS[name], device, "quick" if quick else "full", str(out)]
        with subprocess.Popen(
            command, env=MALLOC_SETTINGS | os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
        ) as process:
            last = "no output on stderr"
            assert process.stderr is not None
            for line in process.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        if process.returncode:
            return {"error": f"section {name} failed (exit {process.returncode}): {last}"}
        found = json.loads(out.read_text())
    # If an installed lmu_dist took precedence, --base would compare a revision with itself.
    assert Path(found.pop("package")) == package / "lmu_dist"
    return found


def median_of(rounds: Sequence[Found]) -> Found:
    """Merges several runs of a section: the median of each measured number, and all notes."""
    for found in rounds:
        if "error" in found:
            return found
    merged = {name: max(found[name] for found in rounds) for name, value in rounds[0].items() if isinstance(value, float)}
    return merged | {
        "tables": {name: tables.merged([found["tables"].get(name, []) for found in rounds]) for name in rounds[0]["tables"]},
        "notes": list(dict.fromkeys(note for found in rounds for note in found["notes"])),
    }


def machine_info(device: str) -> dict[str, Any]:
    """Description of the machine and its software, for the JSON record."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    able = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_capabilities": sorted(able),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "malloc": {name: os.environ.get(name, value) for name, value in MALLOC_SETTINGS.items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def git(*arguments: str) -> str:
    """Output of a git command in this checkout. Raises CalledProcessError."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout.strip()


def revision() -> dict[str, Any]:
    """The commit of this checkout, and whether it has uncommitted changes; None without git."""
    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def commit_of(name: str) -> str:
    """Resolves the name of a revision to a commit. Raises ValueError if there is none."""
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except subprocess.CalledProcessError as e:
        raise ValueError(f"git knows no revision {name!r}; give a branch, a tag or a commit") from e


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Checks out a commit to a temporary git worktree, which is always removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        worktree = Path(folder).resolve() / "base"
        try:
            git("worktree", "add", "--detach", str(worktree), commit)
            yield worktree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(worktree)], capture_output=True)
            git("worktree", "prune")


def run(names: Sequence[str], device: str, quick: bool) -> Iterator[tuple[str, dict[str, Found]]]:
    """Runs the sections on this checkout and prints each. Yields (section, {key of the JSON record: its entry})."""
    for name in names:
        print(f"{name} ..", file=sys.stderr, flush=True)
        found = run_section(name, ROOT, device, quick)
        tables.show(name, found)
        yield name, {"sections": found}


def compare(names: Sequence[str], commit: str, rounds: int, device: str, quick: bool) -> Iterator[tuple[str, dict[str, Found]]]:
    """Runs the sections on this checkout and on a commit in turn, with ratios. Yields as `run` does."""
    with checkout(commit) as base:
        for name in names:
            runs: dict[Path, list[Found]] = {base: [], ROOT: []}
            for i, package in ((i, package) for i in range(rounds) for package in runs):
                side = "head" if package == ROOT else "base"
                print(f"{name}, {side}, {i + 1} of {rounds} ..", file=sys.stderr, flush=True)
                runs[package].append(run_section(name, package, device, quick))
            before, after = median_of(runs[base]), median_of(runs[ROOT])
            ratios = tables.ratios(before, after)
            tables.show(name, after)
            tables.show(f"{name}: head / base", ratios)
            yield name, {"sections": after, "base_sections": before, "ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Writes the JSON file and returns the exit code: 1 if a section failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="file to write, default bench.json")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test that the sections run")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--base", metavar="REV", help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=2, help="with --base: runs per section and revision, default 2")
    given = parser.parse_args(arguments)
    names = given.sections or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device on this machine; omit --device")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    record["command"] = " ".join(["speed.py", *(sys.argv[1:] if arguments is None else arguments)])
    record |= {"quick": given.quick, "git": revision(), "machine": machine_info(given.device), "load_before": os.getloadavg()}
    measured = run(names, given.device, given.quick)
    if given.base:
        try:
            record["base"] = {"revision": given.base, "commit": commit_of(given.base)}
        except ValueError as e:
            parser.error(str(e))
        measured = compare(names, record["base"]["commit"], given.rounds, given.device, given.quick)
    for name, parts in measured:
        for part, found in parts.items():
            record.setdefault(part, {})[name] = found
        record["load_after"] = os.getloadavg()
        given.json.write_text(json.dumps(record, indent=1) + "\n")  # after each section, so that a crash loses no earlier one
    print(f"results written to {given.json}", file=sys.stderr)
    return 1 if any("error" in found for key in ("sections", "base_sections") for found in record.get(key, {}).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
