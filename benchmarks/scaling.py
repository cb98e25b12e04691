"""Speed of one and two workers, and of a worker against a bare loop: JSON out, a line per run on stderr.

    python benchmarks/scaling.py [--n-params 1e4 1e6] [--repeats 3] [--tokens-per-worker 1024]

A run is what `lmu-dist train` does (Ray Train, ZeRO 1, metrics to MLflow, one core per worker), its steps timed by when the
recorder heard of them. The bare loop has the same model and rows, torch's Adam, one core, and neither Ray nor DeepSpeed.
Weak: two workers with as many rows each as one alone. Strong: with half of them. Needs two idle cores.
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
from lmu_dist.launch.cell import make_cell
from lmu_dist.launch.cluster import cluster
from lmu_dist.launch.series import KEEP_MEMORY
from lmu_dist.launch.trainer import train
from lmu_dist.models.lm import LanguageModel
from lmu_dist.records import TRAIN_LOSS
from lmu_dist.tracking.store import default_uri

BLOCK = 4  # steps of which the time is taken at once: the recorder's clock has milliseconds
BLOCKS = 8  # at least, and as many as SECONDS hold; the first two are not counted
SECONDS = 10.0
RUNS = {"one": (1, 1), "weak": (2, 2), "strong": (2, 1)}  # workers, and the batch in shares of one worker


def configured(storage: Path, n_params: float, tokens_per_worker: int) -> Config:
    """One worker, and nothing but steps until the run ends."""
    rows = {"sequence_tokens": 256, "batch_tokens": tokens_per_worker, "eval_tokens": 256, "eval_every_tokens": 10**12}
    return parse(
        {
            "storage": str(storage),
            "experiment": "scaling",
            "model": {"n_params": int(n_params)},
            "train": {"learning_rate": 1e-4, "warmup_tokens": 0, **rows},
            "cluster": {"n_workers": 1, "checkpoint_every_steps": 10**9},
        }
    )


def bare(config: Config, n_steps: int) -> float:
    """Seconds of a step in a loop of plain torch, on one core of a process of its own."""
    torch.set_num_threads(1)
    cell = make_cell(config, prepare(config.data, config.storage_folder))
    rows, settings = cell.corpus.rows("train", config.train.sequence_tokens), config.train
    model = LanguageModel(cell.shape, config.seed)
    adam = torch.optim.Adam(model.parameters(), settings.learning_rate, (settings.beta1, settings.beta2), settings.eps)
    ends = []
    for step in range(n_steps):
        batch = rows.batch(row_indices(len(rows), config.seed, step, settings.batch_rows))
        loss = model(batch.inputs, batch.targets).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        adam.step()
        loss.item()
        ends.append(time.time())
    return step_seconds(ends)


def trained(config: Config) -> float:
    """Seconds of a step of a run, from one step's arrival at the recorder to the next's."""
    finished = train(config, default_uri(Path(config.storage)))
    entries = [json.loads(line) for line in (finished.cell.folder / "spool.jsonl").read_text().splitlines()]
    told = [entry["time_ms"] / 1000 for entry in entries if TRAIN_LOSS in entry.get("values", {})]
    assert len(told) == config.train.n_steps
    assert not finished.already_done
    return step_seconds(told)


def step_seconds(ends: list[float]) -> float:
    """Median over blocks of steps, from the times at which steps ended."""
    marks = ends[2 * BLOCK :: BLOCK]
    return statistics.median((b - a) / BLOCK for a, b in itertools.pairwise(marks))


def measure(config: Config, repeats: int) -> dict[str, Any]:
    """Speeds of one size: the four kinds of runs one after the other, several times, so that all meet the same noise."""
    each = config.train.batch_tokens
    speeds: dict[str, list[float]] = {kind: [] for kind in ("bare", *RUNS)}
    for repeat in range(repeats + 1):
        # A process of its own: this one has Ray's threads. Memory is kept there as in workers, or they would win by that alone.
        with (
            patch.dict(os.environ, KEEP_MEMORY),
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        ):
            seconds = pool.submit(bare, config, n_steps(speeds["bare"], each)).result()
        print(f"bare {seconds * 1e3:.1f} ms", file=sys.stderr, flush=True)
        speeds["bare"].append(each / seconds)
        if not repeat:
            continue  # only says how many steps to take
        for place, (kind, (n_workers, share)) in enumerate(RUNS.items()):
            batch_tokens = share * each
            # Each its own seed: a run that differs in its workers only is the same run, and not done again.
            settings: dict[str, Any] = {"seed": len(RUNS) * repeat + place, "cluster.n_workers": n_workers}
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
    """Steps of a run that takes SECONDS at the speed of earlier ones."""
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
