"""Weak and strong scaling from one to two workers, and overhead against a bare training loop: JSON out, progress on stderr.

    python benchmarks/scaling.py [--n-params 1e4 1e6] [--repeats 3] [--tokens-per-worker 1024]

A run is one of `lmu-dist train` (Ray Train, ZeRO 1, metrics to MLflow, one core per worker). Its steps are timed by when their
metrics were logged. The bare loop has the same model and rows, torch's Adam and one core, without Ray and DeepSpeed. Weak
scaling: each of two workers has as many rows as the single worker. Strong scaling: each has half as many. Needs two idle cores.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lmu_dist.config import Config, parse, with_settings
from lmu_dist.data.batches import row_indices
from lmu_dist.data.prepare import prepare
from lmu_dist.launch.cluster import cluster
from lmu_dist.launch.new_cell import make_cell
from lmu_dist.launch.trainer import train
from lmu_dist.launch.workers import MALLOC_SETTINGS
from lmu_dist.models.lm import LanguageModel
from lmu_dist.records import TRAIN_LOSS
from lmu_dist.tracking.store import default_uri

BLOCK = 4  # steps per timed block; the times of metrics are whole milliseconds
BLOCKS = 8  # smallest number of blocks per run; the first two are not counted
SECONDS = 10.0  # length of a run
RUNS = {"one": (1, 1), "weak": (2, 2), "strong": (2, 1)}  # (workers, batch in units of the single worker's batch)


def configured(storage: Path, n_params: float, tokens_per_worker: int) -> Config:
    """Configuration of one worker that only trains: no evaluation and no checkpoint before the end."""
    rows = {"sequence_tokens": 256, "batch_tokens": tokens_per_worker, "eval_tokens": 256, "eval_every_tokens": 10**12}
    return parse(
        {
            "storage": str(storage),
            "experiment": "scaling",
            "model": {"n_params": int(n_params)},
            "train": {"learning_rate": 1e-4, "warmup_tokens": 0, "log_every_steps": 1, **rows},
            "cluster": {"n_workers": 1, "checkpoint_every_steps": 10**9},
        }
    )


def bare(config: Config, n_steps: int) -> float:
    """Seconds per step of a plain torch loop on one core. Called in a process of its own."""
    torch.set_num_threads(1)
    cell = make_cell(config, prepare(config.data, config.storage_folder))
    rows, settings = cell.corpus.rows("train", config.train.sequence_tokens), config.train
    model = LanguageModel(cell.shape, config.seed)
    adam = torch.optim.Adam(model.parameters(), settings.learning_rate, (settings.beta1, settings.beta2), settings.eps)
    ends = []
    for step in range(n_steps):
        batch = rows.batch(row_indices(len(rows), config.seed, step, settings.batch_rows))
        loss = model(batch.inputs, batch.targets).sum() / batch.targets.numel()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        adam.step()
        loss.item()
        ends.append(time.time())
    return step_seconds(ends)


def trained(config: Config) -> float:
    """Seconds per step of a run of `lmu-dist train`, by the times at which the metrics of its steps were logged."""
    finished = train(config, default_uri(Path(config.storage)))
    entries = [json.loads(line) for line in (finished.cell.folder / "metrics_log.jsonl").read_text().splitlines()]
    logged = [entry["time_ms"] / 1000 for entry in entries if TRAIN_LOSS in entry.get("values", {})]
    assert len(logged) == config.train.n_steps
    assert not finished.already_done
    return step_seconds(logged)


def step_seconds(ends: list[float]) -> float:
    """Seconds per step, the median over blocks of steps, from the end times of all steps."""
    marks = ends[2 * BLOCK :: BLOCK]
    return statistics.median((b - a) / BLOCK for a, b in itertools.pairwise(marks))


def measure(config: Config, repeats: int) -> dict[str, Any]:
    """Speeds at one size. The four kinds of runs are interleaved over the repeats, so that noise affects them alike."""
    each = config.train.batch_tokens
    speeds: dict[str, list[float]] = {kind: [] for kind in ("bare", *RUNS)}
    for repeat in range(repeats + 1):
        # In a process of its own, without Ray's threads, and with the malloc settings of workers, which make them faster.
        with (
            patch.dict(os.environ, MALLOC_SETTINGS),
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        ):
            seconds = pool.submit(bare, config, n_steps(speeds["bare"], each)).result()
        print(f"bare {seconds * 1e3:.1f} ms", file=sys.stderr, flush=True)
        speeds["bare"].append(each / seconds)
        if not repeat:
            continue  # the first round only determines the number of steps
        for i, (kind, (n_workers, share)) in enumerate(RUNS.items()):
            batch_tokens = share * each
            # Different seeds, because runs that differ in their workers only have the same key: they would not run again.
            settings: dict[str, Any] = {"seed": len(RUNS) * repeat + i, "cluster.n_workers": n_workers}
            settings |= {"train.batch_tokens": batch_tokens, "train.tokens": n_steps(speeds["bare"], each) * batch_tokens}
            seconds = trained(with_settings(config, settings))
            print(f"{kind} {seconds * 1e3:.1f} ms", file=sys.stderr, flush=True)
            speeds[kind].append(batch_tokens / seconds)
    del speeds["bare"][0]

    def ratio(kind: str, base: str, factor: float) -> float:
        return statistics.median(a / b / factor for a, b in zip(speeds[kind], speeds[base], strict=True))

    return {
        "family": config.model.family,
        "n_params": config.model.n_params,
        "tokens_per_worker": each,
        "bare_step_seconds": each / statistics.median(speeds["bare"]),
        "tokens_per_second": {kind: statistics.median(values) for kind, values in speeds.items()},
        "against_bare": ratio("one", "bare", 1),
        "weak_scaling": ratio("weak", "one", 2),
        "strong_scaling": ratio("strong", "one", 2),
        "repeats": speeds,
    }


def n_steps(speeds: list[float], tokens: int) -> int:
    """Number of steps of a run that takes SECONDS at the speed of the previous bare run."""
    blocks = max(BLOCKS, round(SECONDS * speeds[-1] / tokens / BLOCK)) if speeds else BLOCKS
    return blocks * BLOCK + 1


def main() -> None:
    """Prints the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n-params", type=float, nargs="+", default=[1e4, 1e5, 1e6])
    parser.add_argument("--tokens-per-worker", type=int, default=1024)
    parser.add_argument("--family", default="lmu")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        configs = [configured(Path(folder), n, given.tokens_per_worker) for n in given.n_params]
        configs = [with_settings(config, {"model.family": given.family}) for config in configs]
        prepare(configs[0].data, configs[0].storage_folder)
        load = os.getloadavg()[0]
        with cluster([with_settings(configs[0], {"cluster.n_workers": 2})]):
            found = [measure(config, given.repeats) for config in configs]
    print(json.dumps({"cpus": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0], "sizes": found}, indent=1))


if __name__ == "__main__":
    main()
