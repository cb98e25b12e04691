"""The file run.json in the folder of a run: the folder and the URI of a store in, the id of the MLflow run out.

Called by launch and upload. MLflow is not asked.
"""

import json

from lmu_dist.config import Folder
from lmu_dist.storage import write_atomic

RUN_FILE = "run.json"  # in the folder of a run: its id and its store


def save_run_id(folder: Folder, uri: str, run_id: str) -> None:
    """Saves the id of a run in its folder, so that the run can go on while MLflow is unavailable."""
    write_atomic(folder / RUN_FILE, json.dumps({"tracking_uri": uri, "run_id": run_id}).encode())


def saved_run_id(folder: Folder, uri: str) -> str | None:
    """The id of a run in a store, saved by an earlier start; None if there is none."""
    try:
        saved = json.loads((folder / RUN_FILE).read_text())
        return saved["run_id"] if saved["tracking_uri"] == uri else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
