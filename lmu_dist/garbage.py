"""How often Python searches for unreachable objects. Called by cli, launch/worker_group and launch/metrics_logger."""

import gc

NEW_OBJECTS = 50_000  # between two searches; Python's default is 700


def collect_rarely() -> None:
    """Makes this process search less often. Call it before slow imports, which make a million objects that all stay.

    A sixth of the imports of a command, a worker or the recorder was such searches.
    """
    gc.set_threshold(NEW_OBJECTS)
