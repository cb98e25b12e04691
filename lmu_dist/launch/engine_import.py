"""Imports train/engine, and with it DeepSpeed, in a process of workers. Called by worker and calibrate.

Importing DeepSpeed takes long. Drivers and trials import launch/worker and launch/calibrate too, and do not need it.
"""

import importlib
import sys


def import_engine() -> None:
    """Imports the engine, and hides MLflow meanwhile, unless it has been imported.

    DeepSpeed's autotuner, which no run uses, imports MLflow where it is installed: a second of a core, 35 MB in every worker,
    and more in a process without Ray, which imports some of the same packages (findings/deepspeed-imports-mlflow.sh).
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]; importing it is now an ImportError
    try:
        importlib.import_module("lmu_dist.train.engine")
    finally:
        if hidden:
            del sys.modules["mlflow"]
