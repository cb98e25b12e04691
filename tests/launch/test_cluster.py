"""What a cluster has room for, and what is refused before it is joined; one that scales itself is asked and waited for."""

import time

import pytest

from lmu_dist.config import ClusterConfig, Config, ConfigError, parse
from lmu_dist.launch import cluster as clusters
from lmu_dist.launch.cluster import check_before

asked: list[int] = []  # of the autoscaler


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The nodes of a cluster this process is in; what is asked of its autoscaler comes at once."""
    found = [{"CPU": 0.0}]
    monkeypatch.setattr(clusters.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(clusters, "_nodes", lambda: found)
    monkeypatch.setattr(
        clusters, "request_resources", lambda bundles: (asked.append(len(bundles)), found.extend(map(dict, bundles)))
    )
    asked.clear()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return found


def test_a_cluster_at_zero_grows(nodes: list[dict[str, float]]):
    config = Config(cluster=ClusterConfig(n_workers=4, wait_seconds=600))
    with clusters.cluster([Config(), config]):
        assert clusters.room(config) == 4
        assert asked == [4, 0]  # and not kept up for ever


def test_a_cluster_that_stays_small_is_said(nodes: list[dict[str, float]]):
    config = Config(cluster=ClusterConfig(n_workers=4, min_workers=2))
    with pytest.raises(ConfigError, match=r"n_workers=4 .* room for \(0; .*wait_seconds"), clusters.cluster([config]):
        pass
    nodes.append({"CPU": 2.0})
    with clusters.cluster([config]):  # two are enough to begin with
        assert clusters.room(config) == 2


def test_workers_on_a_node_each_need_as_many_nodes():
    apart = {"n_workers": 2, "placement": "STRICT_SPREAD"}
    with pytest.raises(ConfigError, match="a node for each of 2 workers, and 1 of the 1 nodes could hold one"):
        check_before([parse({"cluster": apart})])
    check_before([parse({"cluster": apart | {"placement": "SPREAD"}})])


def test_a_cluster_that_is_not_there_is_named_at_once():
    with pytest.raises(ConfigError, match=r"cannot join a Ray cluster at 127\.0\.0\.1:9"):
        check_before([parse({"cluster": {"address": "127.0.0.1:9"}})])
