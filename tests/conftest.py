"""Fixtures shared by all tests: a small corpus on disk and configurations of it."""

import json
import os
import random
from pathlib import Path

import pytest

# Before anything imports Ray or DeepSpeed: the suite must not depend on what the machine has.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)


def write_corpus(folder: Path, n_documents: int = 400, n_files: int = 4, seed: int = 0) -> list[Path]:
    """JSON lines of random words, the same for the same seed."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(300)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(n_files):
        path = folder / f"part-{i}.jsonl"
        documents = (" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(n_documents // n_files))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def corpus_glob(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return str(folder / "*.jsonl")
