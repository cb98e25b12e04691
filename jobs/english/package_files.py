"""Package files: a name, a version and a digest in; the files inside the package out, without installing it.

Packages come by their ordinary clients, apt-get and pip, from the registries that these are set up for. Called by
make_corpus.py.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path


class CorpusError(Exception):
    """The corpus cannot be made. The message says what is wrong and what to do."""


def fetch(package: str, registry: str, version: str, sha256: str, folder: Path) -> Path:
    """The package's file in `folder`, downloaded unless it is there. Raises CorpusError if it is gone, or is another one."""
    folder.mkdir(parents=True, exist_ok=True)
    found = _file_of(package, registry, folder, version)
    if found is None:
        command = (
            ["apt-get", "download", "-qq", f"{package}={version}"]
            if registry == "debian"
            else [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", f"{package}=={version}"]
        )
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1] if done.returncode else ""
        except FileNotFoundError:
            reason = f"there is no {command[0]} here"
        found = _file_of(package, registry, folder, version)
        if reason or found is None:
            where = "Debian 12 (run apt-get update first)" if registry == "debian" else "PyPI"
            raise CorpusError(
                f"{package} {version} cannot be had from {where}: {reason or 'no file'}; put its file into {folder} from an "
                "archive of old versions, or write another version and its sha256 into packages.yaml: that is another corpus"
            )
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != sha256:
        raise CorpusError(
            f"{found} has the sha256 {digest}, packages.yaml wants {sha256} for {package} {version}; delete the file and start "
            "again, or, if another file is wanted, correct packages.yaml: that is another corpus"
        )
    return found


def _file_of(package: str, registry: str, folder: Path, version: str) -> Path | None:
    """The file of a package, as apt-get or pip names it, if it is in the folder."""
    if registry == "debian":
        pattern = f"{package}_{version.replace(':', '%3a')}_*.deb"
    else:
        pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    return next(iter(sorted(folder.glob(pattern))), None)


def extract(file: Path, to: Path) -> list[Path]:
    """Extracts a .deb or a .whl into an empty folder and returns its regular files. Raises CorpusError if it is damaged."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    try:
        if file.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", str(file), str(to)], check=True, capture_output=True, text=True)
        else:
            with zipfile.ZipFile(file) as archive:
                archive.extractall(to)
    except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile) as e:
        raise CorpusError(f"{file} cannot be extracted: {getattr(e, 'stderr', None) or e}") from e
    return sorted(path for path in to.rglob("*") if path.is_file() and not path.is_symlink())
