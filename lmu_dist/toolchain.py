"""What it takes to build C++ at its first use, DeepSpeed's and our own: ninja, and a lock that dies with its holder.

Called by launch/worker and launch/calibrate before they load the engine, and by models/kernels.
"""

import os
import sys
from functools import cache
from pathlib import Path

from filelock import FileLock
from torch.utils import cpp_extension


class KernelBaton:
    """In the place of torch's baton, by which processes take turns at building an extension.

    Torch's is a file that is there or not: one who was killed while building leaves it, and all who come later wait for ever,
    without a word. This one is a lock of the kernel's. Who has waited for it builds too, which is no work if all went well.
    """

    def __init__(self, path: str) -> None:
        self._lock = FileLock(f"{path}.kernel")

    def try_acquire(self) -> bool:
        """Waits for its turn; always True, so that torch never calls `wait`."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """The next one's turn."""
        self._lock.release()


@cache
def prepare_builds() -> None:
    """Makes builds of torch extensions work, and end, in this process. Programs that build in the same folder without having
    called this are not waited for.
    """
    # A worker is started by its interpreter's full path; ninja stands beside it, and need not be on PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    cpp_extension.FileBaton = KernelBaton  # pyright: ignore[reportPrivateImportUsage]
