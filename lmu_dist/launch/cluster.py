"""A Ray cluster for runs: joined, or started on this machine and stopped again. Configs in, a context that holds them out."""

import logging
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.autoscaler.sdk import request_resources
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import RayError

from lmu_dist.config import Config, ConfigError


def check_before(configs: Sequence[Config]) -> None:
    """What can be told without starting anything: raises ConfigError if one of the runs could never be."""
    address = address_of(configs[0])
    if ray.is_initialized():
        return
    if address is not None:
        try:
            _knock(address)
        except (OSError, RayError) as e:
            raise _unreachable(address, e) from e
    elif not configs[0].cluster.gpus_per_worker:
        for config in configs:
            _check_fits(config, [{"CPU": len(os.sched_getaffinity(0))}])
        if shutil.which("g++") is None:
            raise ConfigError("no g++ on PATH, with which DeepSpeed compiles its CPU collectives; apt-get install g++")


@contextmanager
def cluster(configs: Sequence[Config]) -> Iterator[None]:
    """A Ray cluster that can hold each of the runs: the one this process is in, or that at cluster.address or $RAY_ADDRESS,
    else a local one until the end. Raises ConfigError when the workers of one can never fit. While it is held, what Ray says on
    stdout goes to stderr: stdout is for results.
    """
    with joined(configs[0]):
        _wait_for_room(configs)
        _check_all_fit(configs)
        with redirect_stdout(sys.stderr):
            yield


@contextmanager
def joined(config: Config) -> Iterator[None]:
    """The cluster this process is in, or that of the configuration, else a local one; whatever it has room for."""
    if ray.is_initialized():
        yield
        return
    address = address_of(config)
    if address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        cpus = len(os.sched_getaffinity(0))
        ray.init("local", num_cpus=cpus, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)
    else:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError, RayError) as e:
            raise _unreachable(address, e) from e
    try:
        yield
    finally:
        ray.shutdown()


def room(config: Config) -> int:
    """How many workers of this run's kind the cluster this process is in can hold at once."""
    return _room(config, _nodes())


def address_of(config: Config) -> str | None:
    """Of the cluster to be joined; None if one is to be started for the command."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def _unreachable(address: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"cannot join a Ray cluster at {address}: {' '.join(str(error).split())[:200]}; start it, or leave cluster.address "
        "out; set RAY_AUTH_TOKEN to its token (RAY_AUTH_TOKEN_PATH to a file with it), or RAY_AUTH_MODE=disabled if it has none"
    )


def _nodes() -> list[dict[str, float]]:
    """Resources of every live node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _knock(address: str) -> None:
    """Raises OSError if nobody listens at host:port, or not to this token: Ray itself would go on trying, for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    socket.create_connection((host, int(port)), timeout=10).close()
    if address.startswith("ray://"):
        return  # another protocol
    channel = init_grpc_channel(address)
    try:
        NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=10)
    except grpc.RpcError as e:
        raise OSError(e.details() if isinstance(e, grpc.Call) else str(e)) from e
    finally:
        channel.close()


def _wait_for_room(configs: Sequence[Config]) -> None:
    """Asks a cluster that scales itself for what the largest of the runs takes, and waits as long as they allow."""
    largest = max(configs, key=lambda config: config.cluster.n_workers)
    deadline = time.monotonic() + largest.cluster.wait_seconds
    if room(largest) >= largest.cluster.n_workers or not largest.cluster.wait_seconds:
        return
    request_resources(bundles=[_each(largest)] * largest.cluster.n_workers)
    try:
        while room(largest) < largest.cluster.n_workers and time.monotonic() < deadline:
            time.sleep(2)
    finally:
        # Such a request lasts until the next; from now on the runs themselves are what keeps nodes up.
        request_resources(bundles=[])


def _check_all_fit(configs: Sequence[Config]) -> None:
    nodes = _nodes()
    for config in configs:
        _check_fits(config, nodes)


def _each(config: Config) -> dict[str, int]:
    """What one worker takes."""
    wanted = {"CPU": config.cluster.cpus_per_worker, "GPU": config.cluster.gpus_per_worker}
    return {name: n for name, n in wanted.items() if n}


def _room(config: Config, nodes: Sequence[Mapping[str, float]]) -> int:
    """A worker lives on one node: each node holds as many as its scarcest resource allows."""
    return sum(_fitting(config, node) for node in nodes)


def _fitting(config: Config, node: Mapping[str, float]) -> int:
    return min(int(node.get(name, 0) // n) for name, n in _each(config).items())


def _check_fits(config: Config, nodes: Sequence[Mapping[str, float]]) -> None:
    wanted, each, found = config.cluster, _each(config), _room(config, nodes)
    if found < (wanted.min_workers or wanted.n_workers):
        have = " and ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in each)
        raise ConfigError(
            f"cluster.n_workers={wanted.n_workers} with {' and '.join(f'{n} {name}' for name, n in each.items())} each is "
            f"more than the cluster has room for ({found}; {have} on {len(nodes)} nodes); lower cluster.n_workers (or "
            "ladder.workers), cluster.cpus_per_worker or cluster.gpus_per_worker, or use a larger cluster (one that scales "
            "itself needs cluster.wait_seconds)"
        )
    apart = sum(_fitting(config, node) > 0 for node in nodes)
    if wanted.placement == "STRICT_SPREAD" and apart < (needed := wanted.min_workers or wanted.n_workers):
        raise ConfigError(
            f"cluster.placement=STRICT_SPREAD wants a node for each of {needed} workers, and {apart} of the "
            f"{len(nodes)} nodes could hold one; set cluster.placement=SPREAD, or use a larger cluster"
        )
