"""Prepares the corpus of a run if needed: with Ray tasks on the cluster, or with processes on this machine.

Called before training by trainer, ladder and tune, and by the command prepare.
"""

import logging
from collections.abc import Generator, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from lmu_dist.config import Config, ConfigError, FailedError
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.manifest import locate
from lmu_dist.data.prepare import prepare
from lmu_dist.data.progress import Progress
from lmu_dist.data.task_runner import run_in_processes
from lmu_dist.data.tokenize_shard import TokenizeTask, tokenize
from lmu_dist.launch.cluster import address_of, connected
from lmu_dist.storage import check_writable, error_text

logger = logging.getLogger(__name__)
TASKS_PER_CPU = 2  # submitted at a time, so that no CPU waits for the driver


def prepare_corpus(config: Config, progress: Progress = lambda *_: None) -> Corpus:
    """Returns the prepared corpus of a configuration. Raises ConfigError, FailedError. Its notes are logged as warnings.

    Prepares it on all nodes if there is a cluster to connect to, else on this machine.
    """
    check_writable(config.storage_folder)
    location = locate(config.data, config.storage_folder)
    if address_of(config) is None or location.prepared:
        corpus = prepare(config.data, config.storage_folder, progress, run_in_processes, location)
    else:
        with connected(config):
            corpus = prepare(config.data, config.storage_folder, progress, run_as_ray_tasks, location)
    for note in corpus.notes:
        logger.warning("%s", note)
    return corpus


def run_as_ray_tasks(tasks: Sequence[TokenizeTask]) -> Generator[tuple[int, int], None, None]:
    """Runs tokenize tasks as Ray tasks, spread over all nodes (a TaskRunner)."""
    remote_tokenize: Any = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(tokenize)
    waiting, running, finished_bytes = list(reversed(tasks)), dict[Any, TokenizeTask](), 0
    try:
        while waiting or running:
            max_running = max(1, int(ray.cluster_resources().get("CPU", 0)) * TASKS_PER_CPU)
            while waiting and len(running) < max_running:
                task = waiting.pop()
                running[remote_tokenize.options(name=f"tokenize {task.index}").remote(task)] = task
            done, _ = ray.wait(list(running), timeout=10)
            for reference in done:
                ray.get(reference)
                finished_bytes += running.pop(reference).shard.size_bytes
                yield finished_bytes, 0
    except RayTaskError as e:
        cause = cast(Exception, e.cause)
        if isinstance(cause, ConfigError | FailedError):
            raise cause from e
        raise FailedError(f"preparing failed: {error_text(cause)}") from e
    except RayError as e:
        raise FailedError(f"preparing failed: {' '.join(str(e).split())[:300]}") from e
