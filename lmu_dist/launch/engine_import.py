"""Imports train/engine, and with it DeepSpeed, in a process of workers. Called by worker and calibrate.

It takes seconds, so drivers and trials, which import those files too, do without.
"""

import importlib
import sys


def import_engine() -> None:
    """Imports the engine without MLflow, unless the process has it.

    DeepSpeed's autotuner, which no run uses, imports MLflow where it is installed: a second of a core and 40 MB in every worker
    (findings/deepspeed-imports-mlflow.sh).
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]; importing it is now an ImportError
    try:
        importlib.import_module("lmu_dist.train.engine")
    finally:
        if hidden:
            del sys.modules["mlflow"]
