"""What the workers send to the process that writes metrics logs."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmu_dist.launch.metrics_logger import RemoteRunLogger
from lmu_dist.tracking.run_identity import LoggedRun, RunIdentity


def test_a_point_gets_the_time_of_the_worker(tmp_path: Path):
    """The actor may be busy, and write the entry seconds later."""
    sent = list[tuple[Any, ...]]()
    actor: Any = SimpleNamespace(log=SimpleNamespace(remote=lambda *arguments: sent.append(arguments)))
    run = LoggedRun(tmp_path, None, RunIdentity("tests", "ladder", "run", "key", str(tmp_path), "owner"), {})
    before = int(time.time() * 1000)
    RemoteRunLogger(actor, run).log_metrics(7, {"loss": 1.0})
    ((_, method, step, values, time_ms),) = sent
    assert (method, step, values) == ("log_metrics", 7, {"loss": 1.0})
    assert before <= time_ms <= time.time() * 1000
