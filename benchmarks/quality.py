"""Compares the validation loss of LMU algorithms: `python benchmarks/quality.py [CONFIG] [key=value ...]`, JSON out.

It trains the same run with `lmu-dist train` from the same seed, with the plain algorithm (fft) and with the fastest on this
machine, in float32 and in bfloat16. Without a configuration it trains 500 steps.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lmu_dist.config import load, parse, with_settings
from lmu_dist.data.prepare import prepare
from lmu_dist.launch.cluster import cluster
from lmu_dist.launch.trainer import train
from lmu_dist.models.mixers.lmu.mixer import operator
from lmu_dist.tracking.store import default_uri

STEPS = 500
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Prints the JSON object."""
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            config = load(sys.argv[1], [*sys.argv[2:], f"storage={folder}"])
        else:
            config = parse({"storage": folder, "experiment": "quality"})
            config = with_settings(config, {"train.tokens": STEPS * config.train.batch_tokens})
        prepare(config.data, Path(folder))
        found: dict[str, dict[str, Any]] = {}
        with cluster([config]):
            for precision in ("fp32", "bf16"):
                losses: dict[str, Any] = {"operator": operator(None, DTYPES[precision], torch.device("cpu"), 1)}
                for form in ("fft", None):
                    # The form is not part of a run's key: in one storage folder the second run would count as done.
                    storage = Path(folder) / f"{precision}-{form}"
                    storage.mkdir()
                    (storage / "data").symlink_to(Path(folder) / "data")
                    settings = {"train.precision": precision, "model.form": form, "storage": str(storage)}
                    record = train(with_settings(config, settings), default_uri(storage)).record
                    losses["plain" if form else "best"] = record.val_loss_nats
                    print(precision, form, record.val_loss_nats, record.training_seconds, file=sys.stderr, flush=True)
                found[precision] = losses | {"difference_nats": losses["best"] - losses["plain"]}
        print(json.dumps({"steps": config.train.n_steps, "cpus": os.cpu_count(), "val_loss_nats": found}, indent=1))


if __name__ == "__main__":
    main()
