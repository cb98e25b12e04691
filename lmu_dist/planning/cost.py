"""What a grid costs: a configuration in, one line per cell with widths, counts, memory, time and price out.

Builds no model and starts nothing: every number comes from models/accounting and, for the time, from a calibration that
`lmu-dist plan --calibrate` measured or from plan.flops_per_second.
"""

import heapq
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from lmu_dist.config import Config, ConfigError, Folder, to_dict
from lmu_dist.data.manifest import corpus_folder, is_prepared, read_manifest
from lmu_dist.data.tokenizer import configured_vocab_size
from lmu_dist.models import accounting
from lmu_dist.planning.grid import Planned, grid, shared_settings
from lmu_dist.records import known_fields

CALIBRATION = "calibration.json"  # in the storage folder
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Measured:
    """Seconds of one optimizer step, measured. `step` says of which, as `step_of` does."""

    step: dict[str, Any]
    device: str
    step_seconds: float
    worker_flops_per_second: float  # training FLOPs of the step over its seconds, per worker
    n_params: int = 0  # N; 0: measured by version 0.1, which did not store it

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be alike for the speed of one size to tell of another's."""
        return tuple(self.step[key] for key in ("family", "precision", "gpus_per_worker", "cpus_per_worker"))


def step_of(cell: Planned) -> dict[str, Any]:
    """What decides how long a step takes: widths, rows, precision, workers and what each has."""
    train, cluster = cell.config.train, cell.config.cluster
    return {
        "family": cell.shape.family,
        "shape": cell.shape.to_dict(),
        "batch_rows": train.batch_rows,
        "precision": train.precision,
        "options": dict(cell.config.model.options),
        "n_workers": cluster.n_workers,
        "cpus_per_worker": cluster.cpus_per_worker,
        "gpus_per_worker": cluster.gpus_per_worker,
        "zero_stage": cluster.zero_stage,
        "micro_batch_rows": cluster.micro_batch_rows,
    }


@dataclass(frozen=True)
class Line:
    """One cell of the plan. FLOPs and seconds are those of the steps it takes itself, not of those it shares."""

    family: str
    n_params: int
    n_params_with_head: int
    d_model: int
    widths: dict[str, int]  # the family's own
    tokens: int
    seed: int
    steps: int
    shared_steps: int  # taken by a cell of the same trunk with fewer tokens
    batch_tokens: int
    learning_rate: float
    n_workers: int
    flops: float
    flops_kaplan: float  # 6 N per token
    memory_bytes: tuple[float, float, float, float]  # the most a worker needs in a step at ZeRO stage 0 .. 3
    smallest_stage: int | None  # that fits plan.worker_memory_bytes
    zero_stage: int
    step_seconds: float | None
    seconds: float | None
    price: float | None  # None: no price is set


@dataclass(frozen=True)
class Plan:
    """The whole grid, and what it adds up to."""

    lines: tuple[Line, ...]
    left_out: tuple[str, ...]  # cells above ladder.max_cell_flops
    device: str  # whose calibration was used; empty if none
    n_trials: int  # of each cell: more than one for a search, most of whose trials ASHA stops early
    n_slots: int  # workers at once
    wall_seconds: float | None  # on so many slots, every trunk as soon as it fits; starting workers and validation left out

    @property
    def flops(self) -> float:
        """All FLOPs, of all trials to their ends."""
        return self.n_trials * sum(line.flops for line in self.lines)

    @property
    def saved_share(self) -> float:
        """Share of the FLOPs of independent runs that shared trunks save."""
        alone = sum(line.flops * line.steps / (line.steps - line.shared_steps) for line in self.lines)
        return 1 - self.flops / (self.n_trials * alone)

    @property
    def worker_seconds(self) -> float | None:
        """Seconds of one worker for all of it; None if unknown."""
        known = [line.seconds * line.n_workers for line in self.lines if line.seconds is not None]
        return self.n_trials * sum(known) if len(known) == len(self.lines) else None

    def totals(self) -> dict[str, Any]:
        """The sums, by name."""
        names = ("n_trials", "n_slots", "wall_seconds", "flops", "saved_share", "worker_seconds", "price", "device", "left_out")
        return {name: getattr(self, name) for name in names}

    @property
    def price(self) -> float | None:
        """At plan.price_per_worker_hour."""
        known = [line.price for line in self.lines if line.price is not None]
        return self.n_trials * sum(known) if len(known) == len(self.lines) else None


def vocab_tokens(config: Config) -> int:
    """Size of the vocabulary: of the prepared corpus if there is one, else what the tokenizer's settings promise."""
    with suppress(ConfigError):  # a corpus that is not on this machine
        if is_prepared(config.data, config.storage_folder):
            return read_manifest(corpus_folder(config.data, config.storage_folder)).vocab_tokens
    return configured_vocab_size(config.data.tokenizer)


def plan(config: Config) -> Plan:
    """The plan of a configuration: of its ladder, its search, or its one run. Raises ConfigError, as `grid` does."""
    cells, left_out = grid(config, vocab_tokens(config))
    measured = read_calibration(config.storage_folder)
    trunks = _trunks(cells)
    shared = _shared_steps(cells, trunks)
    lines = tuple(_line(cell, shared[i], measured) for i, cell in enumerate(cells))
    names = tuple(f"{c.shape.family} N={c.config.model.n_params:,} D={c.config.train.tokens:,}" for c in left_out)
    kinds = {(cell.shape.family, cell.config.train.precision) for cell in cells}
    used = not config.plan.flops_per_second and any(m.kind[:2] in kinds for m in measured)
    n_trials = config.tune.n_trials if config.tune and not config.ladder else 1
    n_slots = config.plan.n_slots or max(line.n_workers for line in lines)
    wall = _wall_seconds(lines, trunks * n_trials, n_slots)
    return Plan(lines, names, measured[0].device if used else "", n_trials, n_slots, wall)


def step_seconds(cell: Planned, measured: Sequence[Measured]) -> float | None:
    """Seconds of one step: from plan.flops_per_second if given, else as measured for this very step, else from the speed at the
    sizes of its family that were measured (interpolated in log N, constant beyond them); None if nothing is known.
    """
    config, step = cell.config, step_of(cell)
    flops = config.train.batch_tokens * accounting.flops(cell.shape).training / config.cluster.n_workers
    if config.plan.flops_per_second:
        return flops / config.plan.flops_per_second
    if exact := [m for m in measured if m.step == step]:
        return exact[-1].step_seconds
    speeds = {
        m.n_params: math.log(m.worker_flops_per_second)
        for m in measured
        if m.n_params and m.kind == Measured(step, "", 0, 0).kind
    }
    if not speeds:
        return None
    points = sorted((math.log(n), speed) for n, speed in speeds.items())
    return flops / math.exp(_interpolate(points, math.log(accounting.parameters(cell.shape).non_embedding)))


def read_calibration(storage: Folder) -> list[Measured]:
    """What was measured, oldest first; nothing if nothing was."""
    path = storage / CALIBRATION
    return [Measured(**known_fields(Measured, row)) for row in json.loads(path.read_text())] if path.exists() else []


def write_calibration(storage: Folder, measured: Sequence[Measured]) -> Folder:
    """Adds measurements, in place of older ones of the same cells."""
    latest = {json.dumps(m.step, sort_keys=True): asdict(m) for m in [*read_calibration(storage), *measured]}
    path = storage / CALIBRATION
    path.write_text(json.dumps(list(latest.values()), indent=1))
    return path


def _trunks(cells: list[Planned]) -> list[list[int]]:
    """The places of the cells of every trunk, fewest steps first; trunks in the order of their first cells."""
    trunks: dict[str, list[int]] = {}
    for i, cell in enumerate(cells):
        tree = to_dict(cell.config)
        trunk = json.dumps([tree["model"], tree["seed"], shared_settings(tree["train"])], sort_keys=True)
        trunks.setdefault(trunk, []).append(i)
    return [sorted(trunk, key=lambda i: cells[i].config.train.n_steps) for trunk in trunks.values()]


def _shared_steps(cells: list[Planned], trunks: list[list[int]]) -> dict[int, int]:
    """For each cell, by its place, the steps that a cell of its trunk with fewer tokens has taken before."""
    shared = dict.fromkeys(range(len(cells)), 0)
    for trunk in trunks:
        for shorter, longer in pairwise(trunk):
            shared[longer] = cells[shorter].config.train.decay_start
    return shared


def _wall_seconds(lines: Sequence[Line], trunks: list[list[int]], n_slots: int) -> float | None:
    """Until the last trunk has ended, each starting as soon as its workers fit; None if a time is unknown or one never fits."""
    waiting = [(lines[trunk[0]].n_workers, [lines[i].seconds for i in trunk]) for trunk in trunks]
    now, free, running = 0.0, n_slots, list[tuple[float, int]]()
    while waiting or running:
        for work in [w for w in waiting if w[0] <= n_slots and None not in w[1]]:
            if work[0] <= free:
                waiting.remove(work)
                free -= work[0]
                heapq.heappush(running, (now + sum(s for s in work[1] if s is not None), work[0]))
        if not running:
            return None
        now, n_workers = heapq.heappop(running)
        free += n_workers
    return now


def _line(cell: Planned, shared_steps: int, measured: list[Measured]) -> Line:
    config, shape = cell.config, cell.shape
    train, workers = config.train, config.cluster.n_workers
    counts, flops = accounting.parameters(shape), accounting.flops(shape)
    rate = config.plan.price_per_worker_hour
    steps, seconds_each = train.n_steps - shared_steps, step_seconds(cell, measured)
    micro_rows = config.cluster.micro_batch_rows or -(-train.batch_rows // workers)
    activations = accounting.activation_bytes(shape, micro_rows, train.precision, bool(config.cluster.gpus_per_worker))
    memory = tuple(accounting.zero_memory(shape, stage, workers, train.precision).peak_bytes(activations) for stage in STAGES)
    seconds = seconds_each * steps if seconds_each is not None else None
    return Line(
        family=shape.family,
        n_params=counts.non_embedding,
        n_params_with_head=counts.with_head,
        d_model=shape.d_model,
        widths=dict(shape.widths),
        tokens=train.tokens,
        seed=config.seed,
        steps=train.n_steps,
        shared_steps=shared_steps,
        batch_tokens=train.batch_tokens,
        learning_rate=train.learning_rate,
        n_workers=workers,
        flops=steps * train.batch_tokens * flops.training,
        flops_kaplan=steps * train.batch_tokens * flops.training_kaplan,
        memory_bytes=memory,  # pyright: ignore[reportArgumentType]
        smallest_stage=next((s for s in STAGES if memory[s] <= config.plan.worker_memory_bytes), None),
        zero_stage=config.cluster.zero_stage,
        step_seconds=seconds_each,
        seconds=seconds,
        price=seconds / 3600 * workers * rate if seconds is not None and rate else None,
    )


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Linear between sorted points, constant beyond the first and the last."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
