"""A corpus that Ray tasks prepare on two nodes has the bytes of one prepared on one machine. Nothing is prepared in vain."""

import json
import os
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from lmu_dist.config import Config, ConfigError, DataConfig, FailedError, TokenizerConfig, parse
from lmu_dist.data.prepare import prepare
from lmu_dist.data.sources import list_shards
from lmu_dist.data.tokenize_shard import TokenizeTask
from lmu_dist.launch import claim, trainer, tune
from lmu_dist.launch.corpus import prepare_corpus, run_as_ray_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def address():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.timeout(200)
def test_two_nodes_and_one_machine_give_the_same_bytes(corpus_glob: str, tmp_path: Path, address: str, monkeypatch):
    monkeypatch.setattr("lmu_dist.data.sources.SHARD_BYTES", 1)  # a shard for every file
    data = {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}}
    config: Config = parse({"storage": str(tmp_path / "cluster_corpus"), "data": data, "cluster": {"address": address}})
    steps, listings = [], []
    monkeypatch.setattr("lmu_dist.data.manifest.list_shards", lambda data: listings.append(data) or list_shards(data))
    cluster_corpus = prepare_corpus(config, lambda activity, done, *_: steps.append((activity, done)))
    assert not ray.is_initialized()
    assert len(listings) == 1
    assert len([activity for activity, _ in steps if activity == "tokenizing"]) == 4
    local_corpus = prepare(
        DataConfig(source="files", files=(corpus_glob,), tokenizer=TokenizerConfig(vocab_tokens=400)), tmp_path / "local"
    )
    for path in sorted(local_corpus.folder.iterdir()):
        if path.is_file() and path.name != "lock":
            assert (cluster_corpus.folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.timeout(100)
def test_file_that_changed_since_it_was_listed_is_an_error(tmp_path: Path, address: str):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "some words"}) + "\n")
    data = DataConfig(source="files", files=(str(path),), tokenizer=TokenizerConfig(vocab_tokens=400))
    [shard] = list_shards(data)
    os.utime(path, (0, 0))
    ray.init(address, log_to_driver=False)
    try:
        with pytest.raises(FailedError, match=r"a\.jsonl on .* differs from the file that was listed"):
            list(run_as_ray_tasks([TokenizeTask(data, shard, 0, tmp_path)]))
    finally:
        ray.shutdown()


@pytest.mark.parametrize("driver", [trainer.train, tune.tune])
def test_impossible_size_is_refused_before_the_corpus_is_prepared(driver, tmp_path: Path, monkeypatch):
    for module in (trainer, tune):
        monkeypatch.setattr(module, "prepare_corpus", lambda *_: pytest.fail("prepared first"))
    monkeypatch.setattr(claim, "check_store", lambda *_: None)
    content = {"storage": str(tmp_path), "model": {"n_params": 1}}
    if driver is tune.tune:
        content["tune"] = {"families": ["lmu"], "n_params": [1], "space": {"train.learning_rate": {"log": [0.001, 0.01]}}}
    with pytest.raises(ConfigError, match="N = 1 non-embedding parameters"):
        driver(parse(content), f"sqlite:///{tmp_path}/mlflow.db")
