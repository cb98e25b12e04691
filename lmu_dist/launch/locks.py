"""The file locks of drivers and recorders that share a disk, and the id that such drivers share. MLflow is not asked.

Called by run_group, claim, metrics_logger, clean and tidy.
"""

import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from lmu_dist.config import Folder
from lmu_dist.launch.cell import Cell
from lmu_dist.storage import local_state_dir, make_folder
from lmu_dist.tracking.errors import BusyError
from lmu_dist.tracking.run_identity import RunIdentity


@contextmanager
def exclusive_lock(cell: Cell) -> Iterator[None]:
    """Locks the trunk's folder against other drivers while the block runs. Raises BusyError if another holds the lock."""
    try:
        with trunk_lock(cell.trunk_folder, 0):
            yield
    except Timeout as e:
        raise BusyError(f"{cell.name} is being run by another process; wait for it, or change the configuration") from e


def trunk_lock(trunk_folder: Folder, timeout_seconds: float) -> FileLock:
    """The lock of a trunk's folder against other drivers, not locked yet."""
    folder = local_state_dir(trunk_folder)
    make_folder(folder)
    return FileLock(folder / "lock", timeout=timeout_seconds, thread_local=False)


def metrics_log_lock(folder: Folder) -> FileLock:
    """The file lock that a process holds while it writes the metrics log of a run."""
    local = local_state_dir(folder)
    make_folder(local)
    return FileLock(local / "metrics_log.lock", thread_local=False)


def owner_id(cell: Cell) -> str:
    """The id that all drivers with the same file locks share. The first of them writes it to a file next to the locks."""
    folder = local_state_dir(cell.config.storage_folder)
    make_folder(folder)
    path, new = folder / "owner_id", folder / f"owner_id.{uuid.uuid4().hex}"
    if not path.exists():
        new.write_text(f"{platform.node()}:{folder}:{uuid.uuid4().hex[:12]}")
        with suppress(FileExistsError):
            path.hardlink_to(new)  # atomic: the file appears complete, and only one driver succeeds
        new.unlink()
    return path.read_text()


def run_identity(cell: Cell, study: str) -> RunIdentity:
    """The identity of a cell's MLflow run, with which it is found or created."""
    return RunIdentity(cell.config.experiment, study, cell.name, cell.key, str(cell.folder), owner_id(cell))
