"""What a worker saves of a run that diverges. Without Ray: this process is the only rank."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lmu_dist import records
from lmu_dist.config import parse
from lmu_dist.data.prepare import prepare
from lmu_dist.launch.new_cell import make_cell
from lmu_dist.launch.start_point import find_start_point
from lmu_dist.launch.worker import _CellRun
from lmu_dist.train.model import build_model

pytestmark = pytest.mark.filterwarnings("ignore")


def test_weights_that_give_no_finite_loss_are_not_saved(corpus_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The loss of the first step is finite, but that of its new weights is not: they are not the last good checkpoint."""
    from lmu_dist.train.engine import Engine  # imports DeepSpeed

    tree = {
        "storage": str(tmp_path),
        "data": {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}},
        "model": {"n_params": 3000},
        "train": {
            "tokens": 25_600,
            "batch_tokens": 256,
            "sequence_tokens": 32,
            "warmup_tokens": 256,
            "learning_rate": 1e30,
            "clip_norm": 0,
        },
        "cluster": {"checkpoint_every_steps": 1},
    }
    config = parse(tree)
    cell = make_cell(config, prepare(config.data, config.storage_folder))
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        device = torch.device("cpu")
        engine = Engine(build_model(config, cell.shape, device), config.train, config.cluster, device)
        run = _CellRun(cell, engine, 0, None, "a1", 1e9, False, "workers")
        outcome = run.train(replace(find_start_point(cell).state, world_size=1))
        run.finish_upload()
        engine.close()
    finally:
        dist.destroy_process_group()
    assert (outcome.status, outcome.phase, outcome.stop_rule) == (records.DIVERGED, "undecayed", "non-finite loss")
    assert outcome.state.step == 1
    assert outcome.state.train_loss_nats < 10
    assert list(cell.folder.glob("step-*")) == []
