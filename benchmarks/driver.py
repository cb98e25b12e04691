"""Costs of a ladder's driver with thousands of finished cells: JSON out, progress on stderr.

    python benchmarks/driver.py [--cells 5000] [--running 50] [--server] [--folder FOLDER]

Makes a ladder of which all cells have ended, through the interfaces that training uses: each has a metrics log, a record and a
run in MLflow. Then it measures, each in a new process: `lmu-dist ladder`, which finds that all is done; `lmu-dist status`; the
start of a driver and a tick of it (`report_progress`). With --running it measures them again while so many further cells run.
MLflow is an SQLite file, and with --server also an MLflow server of this file, over HTTP on loopback.

Making 5,000 cells takes some ten minutes, half of it for SQLite's commits: a FOLDER in /dev/shm is faster. A FOLDER is kept
and used again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

EXPERIMENT = "many-cells"
CELLS_PER_SEED = 500
N_SIZES, N_BUDGETS = 25, 10
ROW_TOKENS, BATCH_TOKENS = 32, 256
TICKS = 20
SERVER_SECONDS = 120.0  # how long MLflow's server may take to start
FIRST_QUERIES = 20  # enough for each of the server's processes to get one


def job(folder: Path, n_cells: int) -> dict[str, Any]:
    """The configuration of a ladder of `n_cells` cells, a multiple of CELLS_PER_SEED."""
    return {
        "experiment": EXPERIMENT,
        "storage": str(folder / "runs"),
        "data": {"source": "files", "files": [str(folder / "text.jsonl")], "tokenizer": {"vocab_tokens": 400}},
        "train": {
            "schedule": "wsd",
            "sequence_tokens": ROW_TOKENS,
            "batch_tokens": BATCH_TOKENS,
            "warmup_tokens": 10 * BATCH_TOKENS,
            "eval_tokens": 512,
        },
        "ladder": {
            "families": ["lmu", "transformer"],
            "n_params": [round(1000 * 1.2**i) for i in range(N_SIZES)],
            "tokens": [BATCH_TOKENS * 100 * (i + 1) for i in range(N_BUDGETS)],
            "seeds": list(range(n_cells // CELLS_PER_SEED)),
        },
    }


def make_cells(folder: Path, seeds: range, uri: str, points: int, running: int) -> None:
    """Makes the cells of some seeds: those of the ladder finished, or, of a seed beyond it, `running` ones with a heartbeat."""
    from lmu_dist import records
    from lmu_dist.config import load
    from lmu_dist.data.prepare import prepare
    from lmu_dist.launch.cell import Cell
    from lmu_dist.launch.locks import run_identity
    from lmu_dist.launch.new_cell import make_cell
    from lmu_dist.launch.record import Outcome, log_result, log_start, record_of_cell, write_record
    from lmu_dist.planning.grid import grid
    from lmu_dist.records import EvalMetrics, StepMetrics
    from lmu_dist.storage import make_folder
    from lmu_dist.tracking.metrics_log import MetricsLog
    from lmu_dist.tracking.new_run import create_run
    from lmu_dist.tracking.run_file import save_run_id
    from lmu_dist.tracking.store import Store
    from lmu_dist.tracking.studies import open_study
    from lmu_dist.tracking.upload import upload_pending
    from lmu_dist.train.checkpoint import Meta

    config = load(folder / "job.yaml", [f"ladder.seeds={list(seeds)}"])
    corpus = prepare(config.data, config.storage_folder)
    store = Store(uri)
    experiment_id, study_id = open_study(store, EXPERIMENT, "ladder")

    def make(cell: Cell, ends: bool) -> None:
        make_folder(cell.folder)
        identity = run_identity(cell, "ladder")
        run_id = create_run(store, experiment_id, study_id, cell.name, cell.key, identity.folder, identity.owner_id)
        save_run_id(cell.folder, uri, run_id)
        log = MetricsLog(cell.folder, run_id)
        log_start(cell, log)
        log.start_attempt("a", {"lmu.n_workers": 1})
        train = cell.config.train
        n_steps = train.n_steps if ends else train.n_steps // 2
        for i in range(points):
            step = n_steps * (i + 1) // points - 1
            loss = 6 - i / points
            log.log_metrics(
                step, StepMetrics(step, (step + 1) * BATCH_TOKENS, loss, 1.0, 1e-3, 0.1).values(BATCH_TOKENS, 1e6, 1e12)
            )
        evaluation = EvalMetrics(n_steps, 5.0 + cell.config.seed / 1000, 0.01, 2.0, 16, (5.0,) * ROW_TOKENS)
        log.log_metrics(n_steps - 1, evaluation.values())
        log.set_tags({"lmu.status": records.RUNNING})
        if ends:
            saved = vars(evaluation) | {"position_loss_nats": list(evaluation.position_loss_nats)}
            state = Meta(n_steps, cell.key, 1, 1, "", "", "", {}, {}, train_loss_nats=5.0, evaluation=saved)
            record = record_of_cell(cell, Outcome(records.COMPLETE, "decayed", "", state))
            # Without the table by position, which is an artifact: the driver reads none.
            log_result(record, None, log)
            log.end_run(records.COMPLETE)
            write_record(cell, record)
        upload_pending(log, store.connect())

    cells = [make_cell(planned.config, corpus) for planned in grid(config, corpus.manifest.vocab_tokens)[0]]
    with patch("lmu_dist.launch.record.git_commit", lambda: "unknown"):  # it starts two processes
        for cell in cells[:running] if running else cells:
            make(cell, ends=not running)


def measure_driver(folder: Path, uri: str, seeds: range) -> dict[str, float]:
    """Seconds of the start of a driver, after its cells were made, and of a tick of it, the slowest of TICKS."""
    from lmu_dist.config import load
    from lmu_dist.data.prepare import prepare
    from lmu_dist.launch.ladder_driver import LadderDriver
    from lmu_dist.launch.ladder_state import LadderState
    from lmu_dist.launch.new_cell import make_cell
    from lmu_dist.planning.grid import grid
    from lmu_dist.tracking.store import Store
    from lmu_dist.tracking.upload import set_client_limits

    set_client_limits()
    config = load(folder / "job.yaml", [f"ladder.seeds={list(seeds)}"])
    corpus = prepare(config.data, config.storage_folder)
    began = time.perf_counter()
    cells = [make_cell(planned.config, corpus) for planned in grid(config, corpus.manifest.vocab_tokens)[0]]
    made = time.perf_counter()
    driver = LadderDriver(LadderState(cells, Store(uri)))
    started = time.perf_counter()
    ticks = list[float]()
    for _ in range(TICKS):
        before = time.perf_counter()
        driver.report_progress()
        ticks.append(time.perf_counter() - before)
    return {
        "n_cells": len(cells),
        "n_finished": len(driver.state.finished),
        "cells_seconds": made - began,
        "start_seconds": started - made,
        "tick_seconds": max(ticks),
    }


def run(command: list[str], uri: str) -> tuple[dict[str, Any], str]:
    """Runs a command of Python. Returns its seconds and its peak memory in bytes, and its last line on stdout."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone
        spent = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {err.read().decode()[-2000:]}")
        lines = out.read().decode().strip().splitlines()
    figures: dict[str, Any] = {
        "seconds": spent,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024.0,
    }
    return figures, (lines or [""])[-1]


def itself(*arguments: object) -> list[str]:
    """The command that runs one part of this file in a new process: the peak memory of a child includes its parent's."""
    return [str(Path(__file__)), *map(str, arguments)]


def measure(folder: Path, uri: str, n_cells: int, running: int) -> dict[str, Any]:
    """Measures the commands and the driver against one MLflow store. `running`: further cells run."""
    seeds = n_cells // CELLS_PER_SEED + (running > 0)
    found: dict[str, Any] = {"loadavg": os.getloadavg()[0]}
    if not running:  # with running cells it would train them
        found["ladder"], line = run(["-m", "lmu_dist.cli", "ladder", str(folder / "job.yaml")], uri)
        found["ladder"]["last_line"] = line
        print(f"ladder {found['ladder']}", file=sys.stderr)
    found["status"], line = run(["-m", "lmu_dist.cli", "status", EXPERIMENT, "--once"], uri)
    found["status"]["last_line"] = line.strip()
    print(f"status {found['status']}", file=sys.stderr)
    process, line = run(itself("--part", "driver", "--seeds", seeds, "--folder", folder, "--uri", uri), uri)
    found["driver"] = json.loads(line) | {"peak_bytes": process["peak_bytes"]}
    print(f"driver {found['driver']}", file=sys.stderr)
    return found


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The URL of an MLflow server of the folder's SQLite file, with as many processes as MLflow starts by default."""
    import urllib.request

    from lmu_dist.launch.local_commands import free_port

    port = free_port()
    url, mlflow = f"http://127.0.0.1:{port}", Path(sys.executable).parent / "mlflow"

    def ask(_: int) -> None:
        urllib.request.urlopen(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", timeout=60).close()

    command = [str(mlflow), "server", "--backend-store-uri", database(folder), "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # it would start processes for jobs
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + SERVER_SECONDS
            while True:
                try:
                    ask(0)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.5)
            # The first query of each process imports what it needs, which is not to be measured.
            with ThreadPoolExecutor(FIRST_QUERIES) as pool:
                list(pool.map(ask, range(FIRST_QUERIES)))
            yield url
        finally:
            os.killpg(server.pid, 15)
            server.wait()


def database(folder: Path) -> str:
    """The URI of the SQLite file."""
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"


def write_text(path: Path) -> None:
    """Writes a small corpus."""
    lines = (" ".join(f"word{(i * 7 + j * j) % 301}" for j in range(200)) for i in range(400))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def main() -> None:
    """Makes the cells and measures; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=5000, help=f"a multiple of {CELLS_PER_SEED}")
    parser.add_argument("--points", type=int, default=50, help="points of each training curve")
    parser.add_argument("--running", type=int, default=0, help=f"cells that run besides; at most {CELLS_PER_SEED}")
    parser.add_argument("--server", action="store_true", help="measure over HTTP too")
    parser.add_argument("--folder", type=Path, help="where to make the cells; kept")
    parser.add_argument("--part", choices=["cells", "running", "driver"], help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "driver":
        print(json.dumps(measure_driver(options.folder, options.uri, range(options.seeds))))
        return
    if options.part:
        seeds = range(options.seeds, options.seeds + 1) if options.part == "running" else range(options.seeds)
        make_cells(options.folder, seeds, options.uri, options.points, options.running)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {"n_cells": options.cells, "n_running": options.running}
        if not (folder / "made.json").exists():
            write_text(folder / "text.jsonl")
            (folder / "job.yaml").write_text(json.dumps(job(folder, options.cells)))  # JSON is YAML
            seeds = options.cells // CELLS_PER_SEED
            arguments = ("--seeds", seeds, "--folder", folder, "--points", options.points, "--uri", database(folder))
            made, _ = run(itself("--part", "cells", *arguments), database(folder))
            (folder / "made.json").write_text(json.dumps(made))
            print(f"made {made}", file=sys.stderr)
        result["make"] = json.loads((folder / "made.json").read_text())
        with mlflow_server(folder) if options.server else nullcontext() as url:
            stores = {"sqlite": database(folder)} | ({"server": url} if url else {})
            for name, uri in stores.items():
                result[name] = measure(folder, uri, options.cells, 0)
            if options.running:
                if not (marker := folder / f"running-{options.running}").exists():
                    arguments = ("--folder", folder, "--points", options.points, "--uri", database(folder))
                    seeds = ("--seeds", options.cells // CELLS_PER_SEED, "--running", options.running)
                    run(itself("--part", "running", *seeds, *arguments), database(folder))
                    marker.touch()
                for name, uri in stores.items():
                    result[f"{name}_running"] = measure(folder, uri, options.cells, options.running)
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
