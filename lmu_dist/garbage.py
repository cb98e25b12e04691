"""How often Python searches for unreachable objects. Called by processes of this project: commands, workers, the recorder."""

import gc

NEW_OBJECTS = 50_000  # between two searches; Python's default is 700


def collect_rarely() -> None:
    """Makes this process search less often. Call it before slow imports, which make a million objects that all stay.

    A fifth of the start of a command, and of a worker's imports, was such searches.
    """
    gc.set_threshold(NEW_OBJECTS)
