"""A Ray cluster for a run: joined, or started on this machine and stopped again. Config in, a context that holds it out."""

import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from lmu_dist.config import Config, ConfigError


@contextmanager
def cluster(config: Config) -> Iterator[None]:
    """A Ray cluster that can hold the run: the one this process is in, or that at cluster.address or $RAY_ADDRESS, else a
    local one until the end. Raises ConfigError when the workers can never fit.
    """
    wanted = config.cluster
    if ray.is_initialized():
        _check_fits(config, ray.cluster_resources())
        yield
        return
    address = wanted.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        cpus = max(1, len(os.sched_getaffinity(0)))
        if not wanted.gpus_per_worker:
            _check_fits(config, {"CPU": cpus})
            if shutil.which("g++") is None:
                raise ConfigError(
                    "no g++ on PATH; DeepSpeed compiles its CPU collectives once, so install g++ (apt-get install g++)"
                )
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(num_cpus=cpus, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)
    else:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError, RayError) as e:
            reason = " ".join(str(e).split())[:200]
            raise ConfigError(f"no Ray cluster at {address}: {reason}; start it, or leave cluster.address out") from e
    try:
        _check_fits(config, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError if nobody listens at host:port: Ray itself would try for five minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _check_fits(config: Config, resources: Mapping[str, float]) -> None:
    wanted = config.cluster
    for name, each in (("CPU", wanted.cpus_per_worker), ("GPU", wanted.gpus_per_worker)):
        if wanted.n_workers * each > resources.get(name, 0):
            raise ConfigError(
                f"cluster.n_workers={wanted.n_workers} with {each} {name} each is more than the cluster's "
                f"{resources.get(name, 0):g} {name}; lower cluster.n_workers or cluster.{name.lower()}s_per_worker, "
                "or use a larger cluster"
            )
