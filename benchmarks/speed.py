"""Speed and memory of this project on this machine, as one JSON file and tables: `make bench`, some 20 minutes on two cores.

    python benchmarks/speed.py [SECTION ..] [--json bench.json] [--quick] [--device cuda] [--base REV [--rounds 2]]

Each section runs in a process of its own (section.py), with workers' settings of malloc unless the environment has others. With
--base every section is run on both revisions in turn, by this benchmark's code and the other's lmu_dist, and ratios are shown.
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

from lmu_dist.launch.series import KEEP_MEMORY

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECTIONS = {
    "ceilings": "measure:ceilings",
    "mixers": "mixers:measure",
    "step": "steps:step",
    "head": "steps:head",
    "loader": "steps:loader",
    "tokenizing": "tokenizing:measure",
    "generation": "generation:measure",
    "startup": "startup:measure",
}
Found = dict[str, Any]  # a section's tables and notes, or its error


def run_section(name: str, package: Path, device: str, quick: bool) -> Found:
    """What a section finds of the lmu_dist in `package`; {"error": ..} if it fails, with its stderr passed on."""
    above = [package, HERE, ROOT / "tests" / "models"]
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, above), *([inherited] if inherited else [])])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, str(HERE / "section.py"), SECTIONS[name], device, "quick" if quick else "full", str(out)]
        with subprocess.Popen(
            command, env=KEEP_MEMORY | os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
        ) as process:
            last = "nothing said"
            assert process.stderr is not None
            for line in process.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        if process.returncode:
            return {"error": f"section {name} failed (exit {process.returncode}): {last}"}
        found = json.loads(out.read_text())
    # An installed lmu_dist in the place of the one asked for would make a comparison of a revision with itself.
    assert Path(found.pop("package")) == package / "lmu_dist"
    return found


def median_of(rounds: Sequence[Found]) -> Found:
    """One section from several runs of it: every measured number is the median, every note is kept."""
    for found in rounds:
        if "error" in found:
            return found
    merged = {name: max(found[name] for found in rounds) for name, value in rounds[0].items() if isinstance(value, float)}
    return merged | {
        "tables": {name: tables.merged([found["tables"].get(name, []) for found in rounds]) for name in rounds[0]["tables"]},
        "notes": list(dict.fromkeys(note for found in rounds for note in found["notes"])),
    }


def facts(device: str) -> dict[str, Any]:
    """What the numbers hold for."""
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
        "malloc": {name: os.environ.get(name, value) for name, value in KEEP_MEMORY.items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def git(*arguments: str) -> str:
    """What git says of this checkout. Raises CalledProcessError."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout.strip()


def revision() -> dict[str, Any]:
    """The commit of this checkout, and whether it was changed since; None where there is no git."""
    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def commit_of(name: str) -> str:
    """The commit a revision's name stands for. Raises ValueError if there is none."""
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except subprocess.CalledProcessError as e:
        raise ValueError(f"git knows no revision {name!r}; say a branch, a tag or a commit") from e


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A commit in a folder of its own, removed whatever happens."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve() / "base"
        try:
            git("worktree", "add", "--detach", str(place), commit)
            yield place
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(place)], capture_output=True)
            git("worktree", "prune")


def run(names: Sequence[str], device: str, quick: bool) -> Iterator[tuple[str, dict[str, Found]]]:
    """All sections of this checkout, shown as they come: (section, part of the record -> what belongs there)."""
    for name in names:
        print(f"{name} ..", file=sys.stderr, flush=True)
        found = run_section(name, ROOT, device, quick)
        tables.show(name, found)
        yield name, {"sections": found}


def compare(names: Sequence[str], commit: str, rounds: int, device: str, quick: bool) -> Iterator[tuple[str, dict[str, Found]]]:
    """All sections of this checkout and of a commit in turn, and how they relate; as `run`."""
    with checkout(commit) as base:
        for name in names:
            runs: dict[Path, list[Found]] = {base: [], ROOT: []}
            for i, package in ((i, package) for i in range(rounds) for package in runs):
                whose = "head" if package == ROOT else "base"
                print(f"{name}, {whose}, {i + 1} of {rounds} ..", file=sys.stderr, flush=True)
                runs[package].append(run_section(name, package, device, quick))
            before, after = median_of(runs[base]), median_of(runs[ROOT])
            ratios = tables.ratios(before, after)
            tables.show(name, after)
            tables.show(f"{name}: head / base", ratios)
            yield name, {"sections": after, "base_sections": before, "ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the JSON file; 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether it runs, not how fast it is")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--base", metavar="REV", help="another revision to compare with")
    parser.add_argument("--rounds", type=int, default=2, help="with --base: runs of each section and revision")
    given = parser.parse_args(arguments)
    names = given.sections or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; leave out --device")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    record["command"] = " ".join(["speed.py", *(sys.argv[1:] if arguments is None else arguments)])
    record |= {"quick": given.quick, "git": revision(), "machine": facts(given.device), "load_before": os.getloadavg()}
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
        given.json.write_text(json.dumps(record, indent=1) + "\n")  # after each section, lest a later one takes it along
    print(f"written to {given.json}", file=sys.stderr)
    return 1 if any("error" in found for key in ("sections", "base_sections") for found in record.get(key, {}).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
