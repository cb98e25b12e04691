"""What tests of launch share: a Ray, since starting one takes longer than most of them; a folder with a job."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from conftest import write_corpus


@pytest.fixture(scope="session")
def local_ray() -> Iterator[str]:
    """A local Ray with four CPUs and a GPU that is only a number. Drivers in this process use it; others, by its address."""
    context = ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(autouse=True)
def _disconnected(request: pytest.FixtureRequest) -> None:
    """Ends the shared Ray before a test that does not use it: those that do come first, see tests/conftest.py."""
    if "local_ray" not in request.fixturenames:
        ray.shutdown()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a job and its corpus."""
    root = tmp_path / "work"
    write_corpus(root / "corpus")
    tree = {
        "experiment": "tests",
        "storage": str(tmp_path / "storage"),
        "data": {"source": "files", "files": ["corpus/*.jsonl"], "tokenizer": {"vocab_tokens": 400}},
        "model": {"n_params": 3000},
        "train": {"tokens": 25_600, "batch_tokens": 256, "sequence_tokens": 32, "warmup_tokens": 2560, "eval_tokens": 512},
        "cluster": {"n_workers": 1},
    }
    (root / "job.yaml").write_text(json.dumps(tree))
    monkeypatch.chdir(root)
    return root
