"""Makes the wheels that a machine without network needs to run lmu-dist. Called by wheels.sh, in the project's environment.

    wheels.py [--python 3.12] [--have FILE] [--also NAME==VERSION ..] [--to FOLDER] [--part-bytes N]

Packages: everything that lmu-dist requires, at the versions that are installed here (those of requirements.lock), without torch
and what only torch requires. deepspeed, which is published as source only, is built without compiled operators: on a GPU its
ZeRO engine needs none. Ray's wheel is packed again without its Java archive, the dashboard's web page and C headers, which are
almost half of it. The wheels are laid into folders part1, part2, .. of at most --part-bytes each.
"""

import argparse
import base64
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

HERE = Path(__file__).resolve().parent
ROOT, TORCH = "lmu-dist", "torch"
# pip takes a wheel for one of the platforms that it is given, by name. The newest is that of Debian 12 and Ubuntu 22.04.
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(5, 36)), "manylinux2014_x86_64", "manylinux2010_x86_64")
SOURCE_ONLY = ("deepspeed",)
PART_BYTES = 58 * 2**20
# What training, ladders and reports never read.
RAY_UNUSED = re.compile(r"ray/jars/|ray/dashboard/client/|ray/(cpp|include)/|.*\.(h|hpp|jar)$")
# The dashboard serves the jobs API as well, and does not start without the folder of its web page.
RAY_PLACEHOLDERS = {
    "ray/dashboard/client/build/index.html": "<title>Ray</title>The web page of the dashboard was left out.\n",
    "ray/dashboard/client/build/static/README": "The web page of the dashboard was left out.\n",
}


def required(python: str, have: Mapping[str, str | None]) -> dict[str, str]:
    """Name -> version of all packages that lmu-dist requires on Linux x86-64, without torch and those that the target has.

    `have` maps names to versions, or to None if the version is not known. A package whose known version some requirement
    excludes is not skipped. Raises SystemExit if a package is not installed here.
    """
    target = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    versions, waiting, seen = dict[str, str](), [(ROOT, frozenset[str]())], set[tuple[str, frozenset[str]]]()
    while waiting:
        name, extras = item = waiting.pop()
        if item in seen:
            continue
        seen.add(item)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is required on Python {python} and not installed here: run `make setup`") from None
        versions[name] = found.version
        for requirement in map(Requirement, found.requires or []):
            needed = canonicalize_name(requirement.name)
            environments = [target | {"extra": extra} for extra in (extras or {""})]
            if needed == TORCH or not any(requirement.marker is None or requirement.marker.evaluate(e) for e in environments):
                continue
            present = have.get(needed, "")
            if needed in have and (present is None or requirement.specifier.contains(present, prereleases=True)):
                continue
            waiting.append((needed, frozenset(requirement.extras)))
    del versions[ROOT]
    return versions


def installed_names(path: Path) -> dict[str, str | None]:
    """Reads the packages of another machine: lines `name==version`, as `pip list --format=freeze` prints, or names alone."""
    packages = dict[str, str | None]()
    for item in re.split(r"[\s,]+", path.read_text()):
        name, _, version = item.partition("==")
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            packages[canonicalize_name(name)] = version or None
    return packages


def fetch(versions: Mapping[str, str], python: str, to: Path) -> None:
    """Downloads or builds a wheel of every package. Raises CalledProcessError."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = [f"{name}=={version}" for name, version in versions.items() if name not in SOURCE_ONLY]
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    if wheels:
        subprocess.run([*pip, "download", *options, *platforms, "--dest", str(to), *wheels], check=True)
    for name in set(SOURCE_ONLY) & set(versions):
        # Its setup imports torch, so it is built in this environment. It compiles no operators unless DS_BUILD_OPS is set.
        command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-binary", name, "--wheel-dir", str(to)]
        subprocess.run([*command, f"{name}=={versions[name]}"], check=True)


def slim_ray(wheel: Path) -> None:
    """Packs Ray's wheel again without RAY_UNUSED, with a RECORD that lists just what is in it."""
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        record_name = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))
        rows = list[tuple[str, str, int | str]]()
        members = [(info, old.read(info)) for info in old.infolist() if not info.is_dir()]
        kept = [(info, data) for info, data in members if not RAY_UNUSED.match(info.filename) and info.filename != record_name]
        kept += [(zipfile.ZipInfo(name), text.encode()) for name, text in RAY_PLACEHOLDERS.items()]
        for info, data in kept:
            info.external_attr = info.external_attr or 0o644 << 16
            new.writestr(info, data, zipfile.ZIP_DEFLATED, 9)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append((info.filename, f"sha256={digest}", len(data)))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record_name, "", "")])
        new.writestr(record_name, text.getvalue())
    slim.replace(wheel)


def parts(sizes: Mapping[Path, int], limit: int) -> list[list[Path]]:
    """Distributes files over parts of at most `limit` bytes, largest first. Raises SystemExit if a file is larger than that.

    The part with the smallest file comes first: parts in this order can be installed one after the other.
    """
    bins = list[list[Path]]()
    for path in sorted(sizes, key=lambda path: (-sizes[path], path.name)):
        if sizes[path] > limit:
            raise SystemExit(f"{path.name} has {sizes[path]:,} bytes, more than a part may have ({limit:,}); set --part-bytes")
        fitting = [part for part in bins if sum(sizes[p] for p in part) + sizes[path] <= limit]
        (fitting[0] if fitting else bins.append([]) or bins[-1]).append(path)
    return sorted(bins, key=lambda part: min(sizes[path] for path in part))


def lay_out(wheels: Iterable[Path], to: Path, limit: int) -> None:
    """Moves the wheels to `to`/part1, `to`/part2, .. in place of earlier parts, and prints the size of each part."""
    sizes = {path: path.stat().st_size for path in wheels}
    planned = parts(sizes, limit)
    to.mkdir(parents=True, exist_ok=True)
    for old in to.glob("part*"):
        shutil.rmtree(old)
    for i, part in enumerate(planned, 1):
        folder = to / f"part{i}"
        folder.mkdir()
        for path in part:
            shutil.move(path, folder / path.name)
        size = sum(sizes[path] for path in part)
        print(f"{folder}: {size / 2**20:.1f} MiB, {len(part)} wheels, the largest {part[0].name}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="Python version of the target, default 3.12")
    parser.add_argument(
        "--have", type=Path, help="file with the packages that the target has, such as `pip list --format=freeze`"
    )
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="NAME==VERSION", help="further packages, without what they require"
    )
    parser.add_argument("--to", type=Path, default=HERE / "wheels", help="folder for the parts, default benchmarks/gpu/wheels")
    parser.add_argument("--part-bytes", type=int, default=PART_BYTES, help=f"largest size of a part, default {PART_BYTES:,}")
    given = parser.parse_args()
    versions = required(given.python, installed_names(given.have) if given.have else {})
    versions |= {canonicalize_name(name): version for name, _, version in (also.partition("==") for also in given.also)}
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{len(versions)} packages for Python {given.python}", flush=True)
        fetch(versions, given.python, Path(scratch))
        wheels = sorted(Path(scratch).glob("*.whl"))
        made = {parse_wheel_filename(path.name)[0] for path in wheels}
        assert made == set(versions), f"not made: {set(versions) - made}; not wanted: {made - set(versions)}"
        for wheel in wheels:
            if wheel.name.startswith("ray-"):
                slim_ray(wheel)
        lay_out(wheels, given.to, given.part_bytes)


if __name__ == "__main__":
    main()
