"""Part `road`: a small ladder by the command line, on Ray, DeepSpeed and MLflow, with a worker on the GPU.

Its driver is killed in the middle of a run. The ladder is started again, goes on, and a report is written. The corpus is made
up here. Called by part.py.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from gpu.recorder import Recorder
from lmu_dist import records
from lmu_dist.tracking.runs import runs_of
from lmu_dist.tracking.store import Store, default_uri

EXPERIMENT, N_DOCUMENTS = "road", 2000
FAMILIES, TOY_FAMILIES = ("lmu", "transformer"), ("lmu",)  # on a CPU the trunks of two families would share its cores
DEATH_SECONDS = 5.0  # after which the processes of a killed driver are killed one by one
RESERVED_SECONDS = 20.0  # of the part's time: to end processes after a timeout


def run(recorder: Recorder) -> None:
    """Runs the road in a folder of its own, which is deleted afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lmu-road-"))
    try:
        _run(recorder, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(recorder: Recorder, folder: Path) -> None:
    on_gpu = recorder.device.type == "cuda"
    job = folder / "job.json"
    families = FAMILIES if on_gpu else TOY_FAMILIES
    job.write_text(json.dumps(_job(folder, families, on_gpu)))
    ladder = [str(job), f"storage={folder}"]
    began = time.monotonic()
    killed = _start_and_kill(folder, ["ladder", *ladder], recorder.seconds_left / 2)
    recorder.expect(killed, "the driver had no checkpoint in time, or had ended before it could be killed")
    recorder.row("road", stage="first start, killed", seconds=time.monotonic() - began)
    began = time.monotonic()
    exit_code, stdout, message = _run_command(folder, ["ladder", *ladder, "--json"], recorder.seconds_left - RESERVED_SECONDS)
    recorder.row("road", stage="second start", seconds=time.monotonic() - began)
    if exit_code:
        recorder.fail(f"the second start ended with {exit_code}: {message}")
    else:
        result = json.loads(stdout)
        recorder.expect(not result["failures"], f"failures of the ladder: {result['failures']}")
        _check_runs(recorder, folder, result["cells"], 2 * len(families))
    began = time.monotonic()
    report = ["report", EXPERIMENT, "-o", str(folder / "report")]
    exit_code, _, message = _run_command(folder, report, recorder.seconds_left - RESERVED_SECONDS / 2)
    recorder.row("road", stage="report", seconds=time.monotonic() - began)
    recorder.expect(exit_code == 0, f"report ended with {exit_code}: {message}")
    recorder.expect((folder / "report" / "report.html").exists(), "report.html was not written")


def _job(folder: Path, families: Sequence[str], on_gpu: bool) -> dict[str, Any]:
    """Families of one size, with two budgets of tokens each, that share a trunk."""
    rng, corpus = random.Random(0), folder / "corpus.jsonl"
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(300)]
    texts = (" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(N_DOCUMENTS))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    length, batch, n_steps = (256, 8192, 400) if on_gpu else (32, 256, 200)
    return {
        "experiment": EXPERIMENT,
        "data": {"source": "files", "files": [str(corpus)], "tokenizer": {"vocab_tokens": 400}},
        "train": {
            "sequence_tokens": length,
            "batch_tokens": batch,
            "schedule": "wsd",
            "warmup_tokens": 10 * batch,
            "precision": "bf16" if on_gpu else "fp32",
            "eval_every_tokens": n_steps // 2 * batch,
            "eval_tokens": 8 * length,
        },
        "ladder": {
            "families": list(families),
            "n_params": [100_000 if on_gpu else 3_000],
            "tokens": [n_steps * batch, 2 * n_steps * batch],
        },
        "cluster": {"n_workers": 1, "gpus_per_worker": int(on_gpu), "checkpoint_every_steps": 40},
    }


def _environment(folder: Path) -> dict[str, str]:
    """The environment of the commands: records in `folder`, a Ray of their own, nothing sent to anybody."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    kept |= {"LMU_DIST_HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return kept | {"RAY_worker_niceness": "0"}  # by default Ray's workers give way to all other processes of the machine


def _start(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """Starts a command of lmu-dist in a process group of its own. Its stderr goes to a file, `stderr`."""
    command = [sys.executable, "-m", "lmu_dist.cli", *arguments]
    with (folder / "stderr").open("w") as stderr:
        return subprocess.Popen(
            command, env=_environment(folder), stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        )


def _kill(driver: subprocess.Popen[str]) -> None:
    """Kills a command and the process group that it has for itself, and waits until all its descendants are gone."""
    descendants = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    # Ray's processes end when their driver is gone. Those that do not would hold the GPU, or live for ever.
    for process in psutil.wait_procs(descendants, timeout=DEATH_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _run_command(folder: Path, arguments: list[str], timeout: float) -> tuple[int, str, str]:
    """Runs a command to its end. Returns its exit code, its stdout and the last line of its stderr. Raises TimeoutExpired."""
    driver = _start(folder, arguments)
    try:
        stdout, _ = driver.communicate(timeout=timeout)
    except BaseException:
        _kill(driver)
        raise
    finally:
        stderr = (folder / "stderr").read_text()
        print(stderr, file=sys.stderr, flush=True)
    return driver.returncode, stdout, next((line for line in reversed(stderr.splitlines()) if line.strip()), "no output")


def _start_and_kill(folder: Path, arguments: list[str], timeout: float) -> bool:
    """Starts a command and kills it once a run has a checkpoint. Returns whether it was still running then."""
    driver, deadline = _start(folder, arguments), time.monotonic() + timeout
    try:
        while not (saved := list(folder.glob("*/*/step-*/manifest-*"))) and driver.poll() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return bool(saved) and driver.poll() is None
    finally:
        if driver.poll() is None:
            _kill(driver)


def _check_runs(recorder: Recorder, folder: Path, cells: list[dict[str, Any]], n_cells: int) -> None:
    """Every cell is complete, one of them was started twice, and the LMU ran in Triton if there is a GPU."""
    recorder.expect(len(cells) == n_cells, f"{len(cells)} cells instead of {n_cells}")
    store = Store(default_uri(folder))
    tags = {run.info.run_id: run.data.tags for run in runs_of(store, EXPERIMENT)}
    attempts = [int(found.get("lmu.attempt", 0)) for found in tags.values()]
    recorder.expect(max(attempts) > 1, f"no run was continued: starts of the runs {attempts}")
    for cell in cells:
        run_id, family = cell["run_id"], cell["family"]
        operator = tags[run_id].get("lmu.operator", "")
        speeds = store.client.get_metric_history(run_id, records.TOKENS_PER_SECOND)
        recorder.row(
            "runs",
            family=family,
            n_params=cell["n_params"],
            planned_tokens=cell["planned_tokens"],
            status=cell["status"],
            starts=float(tags[run_id].get("lmu.attempt", 0)),
            operator=operator,
            tokens_per_second=speeds[-1].value if speeds else None,
            val_loss_nats=cell["val_loss_nats"],
        )
        recorder.expect(cell["status"] == records.COMPLETE, f"{family}: {cell['status']}")
        steps = [point.step for point in store.client.get_metric_history(run_id, records.TRAIN_LOSS)]
        recorder.expect(len(set(steps)) == len(steps), f"{family}: steps were logged twice")
        if family == "lmu":
            expected = "triton" if recorder.device.type == "cuda" else ""
            recorder.expect(expected in operator, f"the LMU ran as {operator!r}, not on the GPU")
