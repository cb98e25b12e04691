"""Connects to a Ray cluster, or starts a local one and stops it afterwards; checks that the runs fit on it."""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.autoscaler.sdk import request_resources
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import RayError

from lmu_dist.config import Config, ConfigError, FailedError

N_STARTS = 2  # attempts to start a local Ray


def check_before_start(configs: Sequence[Config]) -> None:
    """Raises ConfigError if the cluster is unreachable, or if one of the runs cannot fit on this machine. Starts nothing."""
    address = address_of(configs[0])
    if ray.is_initialized():
        return
    if address is not None:
        try:
            _check_reachable(address)
        except (OSError, RayError) as e:
            raise _unreachable(address, e) from e
    elif not configs[0].cluster.gpus_per_worker:
        for config in configs:
            _check_fits(config, [{"CPU": len(os.sched_getaffinity(0))}])


@contextmanager
def cluster(configs: Sequence[Config]) -> Iterator[None]:
    """Connects to a Ray cluster that has the capacity for each of the runs, one at a time.

    It is the cluster this process is connected to, else the one at cluster.address or $RAY_ADDRESS, else a local one, which is
    stopped when the block ends. Raises ConfigError when the workers of a run cannot fit, FailedError if Ray does not start.
    """
    with connected(configs[0]):
        _wait_for_capacity(configs)
        _check_all_fit(configs)
        yield


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Connects to the same cluster as `cluster` does, without a check of its capacity.

    From its start to its end Ray's output goes to stderr, because stdout is for results.
    """
    if ray.is_initialized():
        with redirect_stdout(sys.stderr):
            yield
        return
    with redirect_stdout(sys.stderr), _unchanged_sigterm() as restore_sigterm:
        try:
            _connect(address_of(config))
            restore_sigterm()
            yield
        finally:
            ray.shutdown()


def _connect(address: str | None) -> None:
    """Connects to a cluster, or starts one on this machine. Raises ConfigError, FailedError."""
    try:
        if address is None:
            _start_local()
        else:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except SystemExit as e:  # Ray exits this way after SIGTERM
        raise KeyboardInterrupt from e
    except (OSError, ValueError, RuntimeError, RayError) as e:
        if address is None:
            raise
        raise _unreachable(address, e) from e


def _start_local() -> None:
    """Starts a Ray on this machine; once more if it does not start in time, as on a busy machine. Raises FailedError."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cpus = len(os.sched_getaffinity(0))
    for attempt in range(N_STARTS):
        try:
            ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            return
        except Exception as e:  # Ray raises plain Exceptions
            ray.shutdown()
            if attempt == N_STARTS - 1:
                reason = " ".join(str(e).split())[:200] or type(e).__name__
                raise FailedError(
                    f"Ray did not start on this machine in {N_STARTS} attempts: {reason}; free CPUs and memory, and look into "
                    "its logs in /tmp/ray/session_latest/logs"
                ) from e


@contextmanager
def _unchanged_sigterm() -> Iterator[Callable[[], object]]:
    """Yields a function that restores the handler of SIGTERM: ray.init replaces it by one that exits, without closing runs."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)

    def restore() -> None:
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)

    try:
        yield restore
    finally:
        restore()


def capacity(config: Config) -> int:
    """How many workers of this run the connected cluster can hold at once."""
    return _capacity(config, _nodes())


def address_of(config: Config) -> str | None:
    """The address of the cluster to connect to; None if a local cluster is to be started."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def _unreachable(address: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"cannot join a Ray cluster at {address}: {' '.join(str(error).split())[:200]}; start it, or leave cluster.address "
        "out; set RAY_AUTH_TOKEN to its token (RAY_AUTH_TOKEN_PATH to a file with it), or RAY_AUTH_MODE=disabled if it has none"
    )


def _nodes() -> list[dict[str, float]]:
    """The resources of every live node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _check_reachable(address: str) -> None:
    """Raises OSError if nothing listens at host:port or the token is refused. Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    socket.create_connection((host, int(port)), timeout=10).close()
    if address.startswith("ray://"):
        return  # the Ray client has another protocol
    channel = init_grpc_channel(address)
    try:
        NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=10)
    except grpc.RpcError as e:
        raise OSError(e.details() if isinstance(e, grpc.Call) else str(e)) from e
    finally:
        channel.close()


def _wait_for_capacity(configs: Sequence[Config]) -> None:
    """Asks the autoscaler for the resources of the largest run, and waits for them up to cluster.wait_seconds."""
    largest = max(configs, key=lambda config: config.cluster.n_workers)
    deadline = time.monotonic() + largest.cluster.wait_seconds
    if capacity(largest) >= largest.cluster.n_workers or not largest.cluster.wait_seconds:
        return
    request_resources(bundles=[_worker_resources(largest)] * largest.cluster.n_workers)
    try:
        while capacity(largest) < largest.cluster.n_workers and time.monotonic() < deadline:
            time.sleep(2)
    finally:
        # A request holds until the next one replaces it. From now on the runs themselves keep the nodes up.
        request_resources(bundles=[])


def _check_all_fit(configs: Sequence[Config]) -> None:
    nodes = _nodes()
    for config in configs:
        _check_fits(config, nodes)


def _worker_resources(config: Config) -> dict[str, float]:
    """The resources of one worker."""
    wanted = {"CPU": config.cluster.cpus_per_worker, "GPU": config.cluster.gpus_per_worker}
    return {name: n for name, n in wanted.items() if n}


def _capacity(config: Config, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers fit on the nodes. A node holds as many as its scarcest resource allows; no worker spans two nodes."""
    return sum(_workers_on_node(config, node) for node in nodes)


def _workers_on_node(config: Config, node: Mapping[str, float]) -> int:
    return min(_n_shares(node.get(name, 0), n) for name, n in _worker_resources(config).items())


def _n_shares(available: float, each: float) -> int:
    """How many workers have `each` of a resource. A share below 1, as of a GPU, is a share of one unit: it never spans two."""
    # In units of 0.0001, as Ray counts: 1 // 0.1 is 9.
    unit, share = round(available * 10_000), round(each * 10_000)
    return int(available) * (10_000 // share) if each < 1 else unit // share


def _check_fits(config: Config, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises ConfigError if the nodes can never hold the workers of a run."""
    wanted, resources, n_fitting = config.cluster, _worker_resources(config), _capacity(config, nodes)
    needed = wanted.min_workers or wanted.n_workers
    if "GPU" in resources and not any(node.get("GPU", 0) for node in nodes):
        raise ConfigError(
            f"cluster.gpus_per_worker={wanted.gpus_per_worker:g}, but Ray has no GPU on its {len(nodes)} nodes; set "
            "cluster.gpus_per_worker=0 to train on CPUs, or use a cluster with GPUs (one with an autoscaler needs "
            "cluster.wait_seconds)"
        )
    if n_fitting < needed:
        each = " and ".join(f"{n:g} {name}" for name, n in resources.items())
        total = " and ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in resources)
        raise ConfigError(
            f"cluster.n_workers={wanted.n_workers} with {each} each does not fit on the cluster, which can hold {n_fitting} "
            f"such workers ({total} on {len(nodes)} nodes); lower cluster.n_workers (or ladder.workers), "
            "cluster.cpus_per_worker or cluster.gpus_per_worker, or use a larger cluster (one with an autoscaler needs "
            "cluster.wait_seconds)"
        )
    n_usable_nodes = sum(_workers_on_node(config, node) > 0 for node in nodes)
    if wanted.placement == "STRICT_SPREAD" and n_usable_nodes < needed:
        raise ConfigError(
            f"cluster.placement=STRICT_SPREAD needs a node for each of {needed} workers, but only {n_usable_nodes} of the "
            f"{len(nodes)} nodes can hold one; set cluster.placement=SPREAD, or use a larger cluster"
        )
