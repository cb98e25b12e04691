"""Measures the seconds per optimizer step of a ladder's cells on the cluster, for `lmu-dist plan --calibrate`.

Starts one Ray Train run for each number of workers and measures a few seconds per model size, on random token ids.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from lmu_dist import background, storage
from lmu_dist.config import Config, Folder, with_settings
from lmu_dist.data.batches import Batch
from lmu_dist.data.progress import Progress
from lmu_dist.launch import process_group
from lmu_dist.launch.cluster import check_before_start, cluster
from lmu_dist.launch.engine_import import import_engine
from lmu_dist.launch.workers import run_workers
from lmu_dist.models import accounting, registry
from lmu_dist.planning.cost import CALIBRATION, StepTime, step_settings, vocab_tokens, write_calibration
from lmu_dist.planning.grid import GridCell, families_of, grid
from lmu_dist.train.model import build_model

SECONDS = 4.0  # of measurement per model size
FIRST_STEPS = 5  # warm-up, not counted
MOST_STEPS = 200
POLL_SECONDS = 1.0  # between two looks at what the workers have measured


def calibrate(config: Config, progress: Progress = lambda *_: None) -> Folder:
    """Measures a step of each distinct model, batch and number of workers of the grid. Returns the file with the results."""
    config = with_settings(config, {"cluster.min_workers": None})  # the time of a step depends on the number of workers
    cells, _ = grid(config, vocab_tokens(config))
    distinct = {json.dumps(step_settings(cell), sort_keys=True): cell for cell in cells}
    check_before_start([cell.config for cell in distinct.values()])
    groups: dict[int, list[GridCell]] = {}
    for cell in distinct.values():
        groups.setdefault(cell.config.cluster.n_workers, []).append(cell)
    sources = registry.sources(set(families_of(config)))
    scratch = config.storage_folder / f"calibration-{time.time_ns():x}"
    progress("measuring", 0, len(distinct), f"{len(distinct)} models, starting the workers")
    with cluster([cell.config for cell in distinct.values()]):
        done = 0
        for group in groups.values():
            storage.make_folder(scratch)
            try:
                out = scratch / "measured.json"
                with _report_measured(out, group, partial(progress, "measuring"), done, len(distinct)):
                    arguments = {"cells": group, "sources": sources, "out": out}
                    run_workers(_measure_worker, arguments, group[0].config, scratch / "run", config.cluster.max_failures)
                write_calibration(config.storage_folder, _read_measured(out))
            finally:
                storage.remove(scratch)
            done += len(group)
    return config.storage_folder / CALIBRATION


def _read_measured(path: Folder) -> list[StepTime]:
    """What the workers have measured so far."""
    return [StepTime(**row) for row in json.loads(path.read_text())] if path.exists() else []


@contextmanager
def _report_measured(
    path: Folder, cells: list[GridCell], progress: Callable[[float, float, str], None], done: int, total: int
) -> Iterator[None]:
    """Calls `progress` for each cell when it is measured, from a background thread, until the block ends."""
    reported = 0

    def report() -> None:
        nonlocal reported
        with suppress(OSError):  # the workers report an error of the storage
            for cell, result in list(zip(cells, _read_measured(path), strict=False))[reported:]:
                reported += 1
                size = f"{cell.shape.family}, N = {result.n_params:,}"
                progress(done + reported, total, f"{size}: {result.step_seconds * 1000:,.1f} ms per step")

    with background.repeated(report, POLL_SECONDS):
        yield
    report()


def _measure_worker(arguments: dict[str, Any]) -> None:
    """Measures every cell. Runs on every worker; rank 0 writes the results."""
    import_engine()
    process_group.join()
    cells: list[GridCell] = arguments["cells"]
    for source in arguments["sources"]:
        registry.register(source)
    device, rank = ray.train.torch.get_device(), ray.train.get_context().get_world_rank()
    torch.set_num_threads(cells[0].config.cluster.cpus_per_worker)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    measured = list[StepTime]()
    for cell in cells:
        measured.append(_measure(cell, device, name))
        if rank == 0:  # after each cell, as the driver shows the progress
            storage.write_atomic(arguments["out"], json.dumps([asdict(m) for m in measured]).encode())
    dist.barrier()


def _measure(cell: GridCell, device: torch.device, device_name: str) -> StepTime:
    from lmu_dist.train.engine import Engine
    from lmu_dist.train.loop import train_steps

    config, train, n_workers = cell.config, cell.config.train, dist.get_world_size()
    engine = Engine(build_model(config, cell.shape, device), train, config.cluster, device)
    rng = np.random.default_rng(dist.get_rank())
    ids = rng.integers(0, cell.shape.vocab_tokens, (-(-train.batch_rows // n_workers), train.sequence_tokens + 1))
    rows = torch.from_numpy(ids)
    batch = Batch(rows[:, :-1], rows[:, 1:])
    taken: list[float] = []
    for metrics in train_steps(engine, lambda _: batch, lambda _: 1e-4, 0, MOST_STEPS, train.batch_tokens):
        taken.append(metrics.step_seconds)
        spent = torch.tensor(sum(taken) / SECONDS if len(taken) > 2 * FIRST_STEPS else 0.0)
        if engine.max_over_ranks(spent.item()) >= 1:
            break
    seconds = engine.max_over_ranks(statistics.fmean(taken[FIRST_STEPS:]))
    engine.close()
    flops = train.batch_tokens * accounting.flops(cell.shape).training / n_workers
    return StepTime(
        step=step_settings(cell),
        device=device_name,
        step_seconds=seconds,
        worker_flops_per_second=flops / seconds,
        n_params=accounting.parameters(cell.shape).non_embedding,
    )
