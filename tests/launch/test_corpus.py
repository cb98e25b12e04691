"""A corpus prepared by Ray tasks on two nodes is that of one machine, to the last byte; a node without the files is named."""

import json
import os
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from lmu_dist.config import Config, DataConfig, FailedError, TokenizerConfig, parse
from lmu_dist.data.prepare import Part, prepare
from lmu_dist.data.sources import list_units
from lmu_dist.launch.corpus import on_cluster, prepared

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def address():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.timeout(200)
def test_two_nodes_make_the_bytes_of_one_machine(corpus_glob: str, tmp_path: Path, address: str, monkeypatch):
    monkeypatch.setattr("lmu_dist.data.sources.UNIT_BYTES", 1)  # a unit for every file
    data = {"source": "files", "files": [corpus_glob], "tokenizer": {"vocab_tokens": 400}}
    config: Config = parse({"storage": str(tmp_path / "there"), "data": data, "cluster": {"address": address}})
    steps = []
    there = prepared(config, lambda what, done, *_: steps.append((what, done)))
    assert not ray.is_initialized()
    assert len([what for what, _ in steps if what == "tokenizing"]) == 4
    here = prepare(
        DataConfig(source="files", files=(corpus_glob,), tokenizer=TokenizerConfig(vocab_tokens=400)), tmp_path / "here"
    )
    for path in sorted(here.folder.iterdir()):
        if path.is_file() and path.name != "lock":
            assert (there.folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.timeout(100)
def test_a_file_that_changed_meanwhile_is_named(tmp_path: Path, address: str):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "some words"}) + "\n")
    data = DataConfig(source="files", files=(str(path),), tokenizer=TokenizerConfig(vocab_tokens=400))
    [unit] = list_units(data)
    os.utime(path, (0, 0))
    ray.init(address, log_to_driver=False)
    try:
        with pytest.raises(FailedError, match=r"a\.jsonl on .* is not the file that was listed"):
            list(on_cluster([Part(data, unit, 0, tmp_path)]))
    finally:
        ray.shutdown()
