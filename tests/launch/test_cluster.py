"""The capacity check of a cluster, before and after connecting to it, and waiting for an autoscaler."""

import signal
import time
from typing import Any

import pytest

from lmu_dist.config import ClusterConfig, Config, ConfigError, FailedError, parse
from lmu_dist.launch import cluster as clusters
from lmu_dist.launch.cluster import check_before_start

requested: list[int] = []  # numbers of bundles requested from the autoscaler


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The nodes of a fake connected cluster. Its autoscaler adds requested nodes at once."""
    found = [{"CPU": 0.0}]
    monkeypatch.setattr(clusters.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(clusters, "_nodes", lambda: found)
    monkeypatch.setattr(
        clusters, "request_resources", lambda bundles: (requested.append(len(bundles)), found.extend(map(dict, bundles)))
    )
    requested.clear()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return found


def test_autoscaling_cluster_grows_from_zero(nodes: list[dict[str, float]]):
    config = Config(cluster=ClusterConfig(n_workers=4, wait_seconds=600))
    with clusters.cluster([Config(), config]):
        assert clusters.capacity(config) == 4
        assert requested == [4, 0]  # the request is withdrawn at the end


def test_cluster_that_is_too_small_is_refused(nodes: list[dict[str, float]]):
    config = Config(cluster=ClusterConfig(n_workers=4, min_workers=2))
    with pytest.raises(ConfigError, match=r"n_workers=4 .* can hold 0 such workers .*wait_seconds"), clusters.cluster([config]):
        pass
    nodes.append({"CPU": 2.0})
    with clusters.cluster([config]):  # min_workers=2 fit
        assert clusters.capacity(config) == 2


def test_strict_spread_needs_a_node_for_each_worker():
    strict_spread = {"n_workers": 2, "placement": "STRICT_SPREAD"}
    with pytest.raises(ConfigError, match="a node for each of 2 workers, but only 1 of the 1 nodes can hold one"):
        check_before_start([parse({"cluster": strict_spread})])
    check_before_start([parse({"cluster": strict_spread | {"placement": "SPREAD"}})])


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each start of a local Ray raises; None if it succeeds. As Ray does, a start prints and takes over SIGTERM."""
    outcomes = list[Any]()

    def init(*_: Any, **__: Any) -> None:
        print("a line of Ray")
        signal.signal(signal.SIGTERM, lambda *_: None)
        if (error := outcomes.pop(0)) is not None:
            raise error

    monkeypatch.setattr(clusters.ray, "init", init)
    monkeypatch.setattr(clusters.ray, "shutdown", lambda: print("another line of Ray"))
    return outcomes


def test_a_local_ray_that_does_not_start_is_started_once_more(starts: list[Any], capfd: pytest.CaptureFixture[str]):
    slow = Exception("The current node timed out during startup.\nThis could happen because")
    before = signal.getsignal(signal.SIGTERM)
    starts += [slow, None]
    with clusters.connected(Config()):
        assert signal.getsignal(signal.SIGTERM) is before
    starts += [slow, slow]
    with (
        pytest.raises(
            FailedError, match=r"^Ray did not start on this machine in 2 attempts: .* startup\. This could"
        ) as raised,
        clusters.connected(Config()),
    ):
        pass
    assert "\n" not in str(raised.value)
    assert signal.getsignal(signal.SIGTERM) is before
    starts.append(SystemExit(15))  # as Ray exits after SIGTERM
    with pytest.raises(KeyboardInterrupt), clusters.connected(Config()):
        pass
    assert capfd.readouterr().out == ""


def test_unreachable_cluster_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"cannot join a Ray cluster at 127\.0\.0\.1:9"):
        check_before_start([parse({"cluster": {"address": "127.0.0.1:9"}})])
