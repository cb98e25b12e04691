"""Elastic training on Ray: a node is lost, later another joins, and the loss curve stays that of an undisturbed run."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from lmu_dist import records
from lmu_dist.config import ConfigError, FailedError, load
from lmu_dist.launch.record import FinishedRun
from lmu_dist.launch.trainer import train
from lmu_dist.tracking.runs import runs_of
from lmu_dist.tracking.store import Store, default_uri

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
STEPS, BATCH = 3000, 2048  # long enough for Ray to find the new node before the run ends
JOB = """
experiment: elastic
data: {{source: files, files: ["{corpus}"], tokenizer: {{vocab_tokens: 400}}}}
model: {{n_params: 30000}}
train: {{tokens: {tokens}, batch_tokens: {batch}, sequence_tokens: 64, warmup_tokens: 20000, learning_rate: 3e-3,
         eval_every_tokens: 512000, eval_tokens: 2048}}
cluster: {{n_workers: 2, min_workers: 1, checkpoint_every_steps: 50}}
"""


def wait_until(condition: Any, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(1200)
def test_run_continues_with_one_worker_and_again_with_two(corpus_glob: str, tmp_path: Path):
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(corpus=corpus_glob, tokens=STEPS * BATCH, batch=BATCH))
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    ray.init(cluster.address, log_to_driver=False)
    try:
        undisturbed = train(load(job, [f"storage={tmp_path / 'undisturbed'}"]), default_uri(tmp_path / "undisturbed"))

        latest, ended = {"step": 0.0}, list[FinishedRun | Exception]()
        uri = default_uri(tmp_path / "disturbed")

        def run() -> None:
            try:
                ended.append(train(load(job, [f"storage={tmp_path / 'disturbed'}"]), uri, listener=latest.update))
            except (ConfigError, FailedError, OSError) as e:
                ended.append(e)

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: latest["step"] > 200 or ended)
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        store = Store(uri)

        def workers() -> str:
            [found] = runs_of(store, "elastic")
            return found.data.tags["lmu.attempt"] + ":" + found.data.tags["lmu.n_workers"]

        wait_until(lambda: workers() == "2:1" or ended)
        one_from = latest["step"]
        wait_until(lambda: latest["step"] > one_from + 200 or ended)
        cluster.add_node(num_cpus=1)
        wait_until(lambda: workers() == "3:2" or ended)
        two_from = latest["step"]
        assert two_from < STEPS - 100
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    [disturbed] = ended
    assert isinstance(disturbed, FinishedRun), disturbed

    def losses(finished: FinishedRun) -> list[float]:
        points = Store(finished.tracking_uri).client.get_metric_history(finished.run_id, records.TRAIN_LOSS)
        assert sorted(p.step for p in points) == list(range(STEPS))  # each step is logged once
        return [p.value for p in sorted(points, key=lambda p: p.step)]

    differences = [abs(a - b) for a, b in zip(losses(undisturbed), losses(disturbed), strict=True)]
    print(f"one worker from step {one_from:.0f}, two from {two_from:.0f}; largest difference {max(differences):.2e} nats")
    # With one worker the order of float sums differs, and training amplifies the difference like any rounding error.
    assert max(differences[: int(one_from) + 50]) < 1e-5
    assert sum(differences) / STEPS < 0.005
    assert max(differences) < 0.05
    assert disturbed.record.val_loss_nats == pytest.approx(undisturbed.record.val_loss_nats, abs=0.005)
