"""Compiles C++ sources that use torch's headers into a shared library. Needs a compiler, and nothing but torch besides.

torch's own `cpp_extension.load` needs ninja and setuptools. Called by compiled.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock  # torch requires it, so it is there where torch is

TORCH = Path(torch.__file__).parent


def default_folder() -> Path:
    """The folder for libraries, that of torch's extensions: `$TORCH_EXTENSIONS_DIR`, else one in the user's cache."""
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def compiler() -> str:
    """The C++ compiler: `$CXX`, else c++."""
    return os.environ.get("CXX", "c++")


def shared_library(path: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    """Compiles the sources into the library `path`, unless it exists: its name must say all that it depends on.

    The sources are compiled at the same time. Of several processes one compiles and the others wait for it; if it is killed,
    another one begins anew. Raises OSError if there is no compiler or the folder is read-only, RuntimeError with the compiler's
    messages if it fails.
    """
    if path.exists():
        return
    name = compiler()
    if not shutil.which(name):
        raise OSError(f"there is no C++ compiler {name}; install g++, or name another in CXX")
    # g++'s code finds the OpenMP of torch; a second one would have threads of its own. clang's code needs another one, which
    # its package libomp-dev holds.
    is_clang = "clang" in subprocess.run([name, "--version"], capture_output=True, text=True).stdout
    link_flags = [flag for flag in flags if is_clang or flag != "-fopenmp"]
    path.parent.mkdir(parents=True, exist_ok=True)
    # The operating system releases the lock when its holder dies. What its compilers go on writing is in a folder of its own.
    with FileLock(f"{path}.lock"):
        if path.exists():  # another process has compiled it meanwhile
            return
        with TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor() as threads:
            objects = [f"{folder}/{source.stem}.o" for source in sources]
            compilations = [
                [name, "-c", "-fPIC", *flags, "-isystem", str(TORCH / "include"), str(source), "-o", target]
                for source, target in zip(sources, objects, strict=True)
            ]
            list(threads.map(_run, compilations))
            linked = f"{folder}/{path.name}"
            _run([name, "-shared", *link_flags, *objects, f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-o", linked])
            os.replace(linked, path)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr or f"{command[0]} ended with code {done.returncode}")
