"""Processes of which there are many skip slow imports: trials torch and MLflow, workers MLflow and torch's compiler.

Nor does a worker let DeepSpeed compile anything, and a ladder that has ended waits for no Ray Tune.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lmu_dist.config import parse
from lmu_dist.data.prepare import prepare
from lmu_dist.launch.new_cell import make_cell
from lmu_dist.tracking.metrics_log import MetricsLog

FAMILY = """
from lmu_dist.models.family import Family
from lmu_dist.models.mixers.feed_forward import FeedForward

class Plain(Family):
    title = "Plain words"

    def mixer(self, shape, options):
        return FeedForward(shape.d_model, shape.d_model)
"""
UNNEEDED = ("torch", "deepspeed", "safetensors", "jaxtyping", "datasets", "mlflow", "sqlalchemy")
ON_THE_HEAD = f"""
import json, pickle, sys
from pathlib import Path
from unittest.mock import Mock

import lmu_dist.cli, lmu_dist.launch.jobs
import lmu_dist.launch.ladder_trial
import lmu_dist.launch.tune_trial
from lmu_dist.launch import metrics_logger
from lmu_dist.launch.record import log_start, read_record, record_of_cell, write_record
from lmu_dist.tracking.metrics_log import MetricsLog

cell = pickle.loads(Path(sys.argv[1]).read_bytes())
log_start(cell, MetricsLog(cell.folder, None))
write_record(cell, record_of_cell(cell, None))
assert read_record(cell).key == cell.key
metrics_logger.ray = ray = Mock()
ray.get.return_value = [Mock(not_uploaded="")]
metrics_logger.close_logs(Mock(), [Mock()], 1.0)
print(json.dumps([name for name in {UNNEEDED} if name in sys.modules]))
"""


def test_trial_controller_and_jobs_command_import_neither_torch_nor_mlflow(tmp_path: Path, corpus_glob: str):
    """The first two unpickle a cell, also of a user's own family, log its constants, write its record, and close its log."""
    (tmp_path / "plain.py").write_text(FAMILY)
    config = parse(
        {
            "storage": str(tmp_path / "runs"),
            "data": {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}},
            "model": {"n_params": 3000, "family": f"{tmp_path / 'plain.py'}:Plain"},
            "train": {"tokens": 25_600, "batch_tokens": 256, "sequence_tokens": 32, "warmup_tokens": 2560},
        }
    )
    cell = make_cell(config, prepare(config.data, config.storage_folder))
    (tmp_path / "cell").write_bytes(pickle.dumps(cell))
    command = [sys.executable, "-c", ON_THE_HEAD, str(tmp_path / "cell")]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == []
    record = json.loads((cell.folder / "record.json").read_text())
    assert (record["family"], record["n_params"]) == ("plain", cell.parameters.non_embedding)
    assert record["training_flops_per_token"] == cell.flops.training > 0
    tags = [entry["values"] for _, entry in MetricsLog(cell.folder, None).pending() if entry["kind"] == "tags"]
    [appearance] = [values["lmu.family_appearance"] for values in tags if "lmu.family_appearance" in values]
    assert json.loads(appearance)["title"] == "Plain words"


@pytest.mark.parametrize(
    ("modules", "unneeded"),
    [
        ("lmu_dist.launch.ladder, lmu_dist.report.write", ("ray.tune", "triton", "torch.utils.flop_counter", "scipy.stats")),
        ("lmu_dist.launch.submission", ("mlflow", "sqlalchemy", "ray.tune", "triton", "scipy.stats")),
    ],
)
def test_the_commands_ladder_and_submit_import_nothing_slow_that_they_may_not_need(modules: str, unneeded: tuple[str, ...]):
    """A second and a half of the ten that a ladder may take which has ended; a second of each submission."""
    listed = f"[name for name in {unneeded} if name in sys.modules]"
    script = f"import json, sys, {modules}; print(json.dumps({listed}))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(process.stdout) == []


IN_A_WORKER = """
import json, os, sys, tempfile, torch
from pathlib import Path
import torch.distributed as dist
import lmu_dist.launch.calibrate, lmu_dist.launch.worker
from lmu_dist.config import ClusterConfig, TrainConfig
from lmu_dist.data.batches import Batch
from lmu_dist.launch.engine_import import import_engine
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.sizing import shape_for

assert "deepspeed" not in sys.modules
import_engine()
from lmu_dist.train.engine import Engine

os.environ["LOCAL_RANK"] = "0"
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
shape = shape_for("lmu", 3000, vocab_tokens=64, sequence_tokens=16)
train = TrainConfig(batch_tokens=32, sequence_tokens=16)
engine = Engine(LanguageModel(shape), train, ClusterConfig(zero_stage=1), torch.device("cpu"))
ids = torch.arange(32).view(2, 16)
engine.step(Batch(ids, ids), 1e-3)
with tempfile.TemporaryDirectory() as folder:
    engine.save(Path(folder))
    engine.load(Path(folder))
print(json.dumps([name for name in ("mlflow", "torch._dynamo", "torch._inductor") if name in sys.modules]))
"""


def test_a_worker_trains_without_mlflow_and_any_compiler(tmp_path: Path):
    """MLflow and torch's compiler would each take a second of a core and tens of MB in every worker.

    DeepSpeed would compile an operator that training does not use, and fail where there is no C++ compiler.
    """
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    process = subprocess.run([sys.executable, "-c", IN_A_WORKER], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == []
    assert list(tmp_path.iterdir()) == []
