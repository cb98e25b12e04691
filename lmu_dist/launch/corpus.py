"""The corpus of a run: a Config in, the prepared Corpus out, made if need be: on the cluster, or by the cores of this machine.

Called by the drivers (trainer, ladder, tune) and by the command prepare, before anything is trained.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.manifest import is_prepared
from lmu_dist.data.prepare import Part, Progress, in_processes, prepare, tokenize
from lmu_dist.launch.cluster import address_of, joined
from lmu_dist.storage import check_writable

TASKS_PER_CPU = 2  # under way at once, so that no core waits for the driver


def prepared(config: Config, progress: Progress = lambda *_: None) -> Corpus:
    """The corpus of a configuration, prepared on all nodes of the cluster if one is joined. Raises ConfigError, FailedError."""
    check_writable(config.storage_folder)
    if address_of(config) is None or is_prepared(config.data, config.storage_folder):
        return prepare(config.data, config.storage_folder, progress, in_processes)
    with joined(config):
        return prepare(config.data, config.storage_folder, progress, on_cluster)


def on_cluster(parts: Sequence[Part]) -> Iterator[Part]:
    """Spreads parts over the CPUs of all nodes as Ray tasks; those of a node that is lost run again elsewhere."""
    task: Any = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(tokenize)
    waiting, running = list(reversed(parts)), dict[Any, Part]()
    try:
        while waiting or running:
            at_once = max(1, int(ray.cluster_resources().get("CPU", 0)) * TASKS_PER_CPU)
            while waiting and len(running) < at_once:
                part = waiting.pop()
                running[task.options(name=f"tokenize {part.index}").remote(part)] = part
            done, _ = ray.wait(list(running), timeout=10)
            for reference in done:
                ray.get(reference)
                yield running.pop(reference)
    except RayTaskError as e:
        cause = cast(Exception, e.cause)
        raise (cause if isinstance(cause, ConfigError | FailedError) else FailedError(f"preparing failed: {cause}")) from e
    except RayError as e:
        raise FailedError(f"preparing failed: {' '.join(str(e).split())[:300]}") from e
