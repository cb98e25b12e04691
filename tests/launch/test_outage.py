"""An MLflow server that stops in the middle of a run: training does not wait, and the metrics are complete afterwards."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lmu_dist import records
from lmu_dist.config import load
from lmu_dist.launch.local_commands import free_port
from lmu_dist.launch.trainer import train
from lmu_dist.tracking.store import Store

OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "60"))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


class Server:
    """An `mlflow server` on loopback with an SQLite file, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", str(self.folder)]
        command = [sys.executable, "-m", "mlflow", "server", *options, "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        pytest.fail("the MLflow server did not start")

    def stop(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()


def test_training_does_not_wait_for_mlflow(corpus_glob: str, tmp_path: Path):
    job = tmp_path / "job.yaml"
    job.write_text(f"data: {{source: files, files: ['{corpus_glob}'], tokenizer: {{vocab_tokens: 400}}}}\n")
    shape = ["model.n_params=3000", "train.sequence_tokens=32", "train.batch_tokens=256", "train.warmup_tokens=2560"]
    n_steps = int(100 * OUTAGE_SECONDS)  # at about 70 steps a second
    length = [f"train.tokens={256 * n_steps}", "train.eval_every_tokens=1e6", "train.eval_tokens=512"]
    config = load(job, [f"storage={tmp_path}", *shape, *length, "cluster.checkpoint_every_steps=1000"])
    server = Server(tmp_path)
    server.start()
    seen: list[tuple[float, float, bool]] = []  # time, step, whether the server was running
    outage_start: list[float] = []

    def listen(latest: dict[str, float]) -> None:
        step = latest.get("step", 0)
        server_running = not outage_start or time.monotonic() - outage_start[0] > OUTAGE_SECONDS
        seen.append((time.monotonic(), step, server_running))
        if step > 200 and not outage_start:
            server.stop()
            outage_start.append(time.monotonic())
        elif outage_start and server_running and server.process.poll() is not None:
            server.start()

    try:
        finished = train(config, server.uri, listener=listen)
        assert finished.record.status == "complete"
        points = Store(server.uri).client.get_metric_history(finished.run_id, records.TRAIN_LOSS)
        assert sorted(p.step for p in points) == list(range(n_steps))
        assert Store(server.uri).client.get_run(finished.run_id).info.status == "FINISHED"
    finally:
        server.stop()
    during = [(t, s) for t, s, server_running in seen if not server_running]
    outage_steps = during[-1][1] - during[0][1]
    print(f"{outage_steps} steps in {during[-1][0] - during[0][0]:.0f} s without a server")
    assert outage_steps > 10 * (during[-1][0] - during[0][0])
