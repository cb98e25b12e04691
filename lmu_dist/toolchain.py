"""Setup for DeepSpeed's just-in-time builds of torch extensions: finds ninja and makes the build lock crash-safe.

Called by train/engine before DeepSpeed builds, and by launch/worker. Our own kernels are built by models/kernels/build.
"""

import os
import sys
from functools import cache
from pathlib import Path

from filelock import FileLock
from torch.utils import cpp_extension


class FlockBaton:
    """Replaces torch's FileBaton, the lock by which processes take turns at building an extension.

    Torch's lock is a file that exists or not. A process killed during a build leaves it behind, and every later process waits
    for ever without a message. This one is an flock, which the operating system releases when its holder dies. A process that
    has waited for the lock runs the build too; ninja then finds nothing to do.
    """

    def __init__(self, path: str) -> None:
        self._lock = FileLock(f"{path}.kernel")

    def try_acquire(self) -> bool:
        """Blocks until the lock is free. Always returns True, so that torch never calls `wait`."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Releases the lock."""
        self._lock.release()


@cache
def configure_extension_builds() -> None:
    """Puts ninja on PATH and installs the crash-safe build lock in this process. Call it before the first build.

    Processes that build in the same folder without this call use torch's lock, and the two locks do not see each other.
    """
    # Ray starts a worker by its interpreter's full path. ninja is in the same folder, which need not be on PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    cpp_extension.FileBaton = FlockBaton  # pyright: ignore[reportPrivateImportUsage]


def build_folder() -> Path:
    """The folder in which extensions are built, or the folder in which it will be made."""
    folder = Path(cpp_extension.get_default_build_root())
    return next(path for path in (folder, *folder.parents) if path.exists())
