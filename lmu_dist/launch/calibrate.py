"""Measures the seconds per optimizer step of a ladder's cells on the cluster, for `lmu-dist plan --calibrate`.

Starts one Ray Train run for each number of workers and measures a few seconds per model size, on random token ids.
"""

import json
import platform
import statistics
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from lmu_dist import storage
from lmu_dist.config import Config, Folder, with_settings
from lmu_dist.data.batches import Batch
from lmu_dist.data.prepare import Progress
from lmu_dist.launch.cell import build_model
from lmu_dist.launch.cluster import check_before_start, cluster
from lmu_dist.launch.run_group import run_workers
from lmu_dist.models import accounting, registry
from lmu_dist.planning.cost import CALIBRATION, StepTime, step_settings, vocab_tokens, write_calibration
from lmu_dist.planning.grid import GridCell, families_of, grid
from lmu_dist.toolchain import configure_extension_builds

SECONDS = 4.0  # of measurement per model size
FIRST_STEPS = 5  # warm-up, not counted
MOST_STEPS = 200


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
    with cluster([cell.config for cell in distinct.values()]):
        for i, group in enumerate(groups.values()):
            progress("measuring", i, len(groups))
            storage.make_folder(scratch)
            try:
                out = scratch / "measured.json"
                run_workers(_measure_worker, {"cells": group, "sources": sources, "out": out}, group[0].config, scratch / "run")
                write_calibration(config.storage_folder, [StepTime(**row) for row in json.loads(out.read_text())])
            finally:
                storage.remove(scratch)
    return config.storage_folder / CALIBRATION


def _measure_worker(arguments: dict[str, Any]) -> None:
    """Measures every cell. Runs on every worker; rank 0 writes the results."""
    configure_extension_builds()
    cells: list[GridCell] = arguments["cells"]
    for source in arguments["sources"]:
        registry.register(source)
    device, rank = ray.train.torch.get_device(), ray.train.get_context().get_world_rank()
    torch.set_num_threads(cells[0].config.cluster.cpus_per_worker)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    measured = [_measure(cell, device, name) for cell in cells]
    if rank == 0:
        arguments["out"].write_text(json.dumps([asdict(m) for m in measured]))
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
