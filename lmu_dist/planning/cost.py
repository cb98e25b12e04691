"""Cost of a grid: widths, parameters, FLOPs, memory, time and price of every cell of a configuration.

Trains nothing. Counts come from models/accounting. Times come from the FLOPs that are executed and plan.flops_per_second, or
from the step times that `lmu-dist plan --calibrate` measured.
"""

import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from filelock import FileLock

from lmu_dist import storage
from lmu_dist.config import Config, ConfigError, Folder, to_dict
from lmu_dist.data.tokenizer import configured_vocab_size
from lmu_dist.models import accounting, registry
from lmu_dist.models.shape import Shape
from lmu_dist.planning.grid import GridCell, grid, trunk_settings
from lmu_dist.planning.plan_notes import epochs_of, plan_notes, prepared_corpus
from lmu_dist.records import known_fields

CALIBRATION = "calibration.json"  # in the storage folder
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class StepTime:
    """Measured time of one optimizer step."""

    step: dict[str, Any]  # which step: the result of `step_settings`
    device: str
    step_seconds: float
    worker_flops_per_second: float  # counted training FLOPs of the step over its seconds, per worker; for the record only
    n_params: int = 0  # N; 0 in files of version 0.1, which did not store it

    @property
    def speed_group(self) -> tuple[Any, ...]:
        """Settings that must be equal for the speed at one size to predict the speed at another size."""
        always = tuple(self.step[key] for key in ("family", "precision", "gpus_per_worker", "cpus_per_worker"))
        return always + tuple(self.step.get(key) for key in ("gradient_precision", "activation_checkpointing", "offload"))


def step_settings(cell: GridCell) -> dict[str, Any]:
    """The settings that determine the time of a step: widths, rows, precision, workers, and CPUs and GPUs per worker."""
    train, cluster = cell.config.train, cell.config.cluster
    # Calibrations of earlier versions have no entries for these.
    added = {
        "gradient_precision": "fp32" if train.float32_gradients else None,
        "activation_checkpointing": cluster.activation_checkpointing or None,
        "offload": cluster.offload,
    }
    return {key: value for key, value in added.items() if value is not None} | {
        "family": cell.shape.family,
        "family_version": registry.version_of(registry.family_of(cell.shape), cell.config.model.options),
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


def executed_step_flops(step: dict[str, Any]) -> float:
    """Training FLOPs per worker that are executed in an optimizer step with these `step_settings`."""
    shape, n_workers = Shape.from_dict(step["shape"]), step["n_workers"]
    share_rows = -(-step["batch_rows"] // n_workers)
    per_token = accounting.executed_flops(
        shape,
        min(step["micro_batch_rows"] or share_rows, share_rows),
        on_gpu=bool(step["gpus_per_worker"]),
        activation_checkpointing=bool(step.get("activation_checkpointing")),
    )
    return step["batch_rows"] * shape.sequence_tokens * per_token / n_workers


@dataclass(frozen=True)
class CellCost:
    """Cost of one cell. FLOPs, seconds and price exclude the steps that it shares with a shorter cell of the same trunk."""

    family: str
    n_params: int
    n_params_with_head: int
    d_model: int
    widths: dict[str, int]  # other widths of the family
    tokens: int
    epochs: float | None  # how often the run trains on the rows of the corpus; None: the corpus is not prepared
    seed: int
    steps: int
    shared_steps: int  # steps that a cell of the same trunk with fewer tokens takes
    batch_tokens: int
    learning_rate: float  # peak; where the schedule is stepped that of the last plateau, after first_learning_rate
    first_learning_rate: float
    n_workers: int
    flops: float  # counted: those of the paper's form, which fits use
    executed_flops: float  # those that decide the time
    flops_kaplan: float  # 6 N per token
    memory_bytes: tuple[float, float, float, float]  # peak memory of a worker at ZeRO stages 0 .. 3
    host_bytes: float  # of each GPU worker in the CPU's memory, for an offloaded optimizer
    smallest_stage: int | None  # smallest ZeRO stage that fits the worker's plan.worker_memory_bytes; None: none fits
    zero_stage: int
    step_seconds: float | None
    seconds: float | None
    price: float | None  # None: no price is set, or the time is unknown


@dataclass(frozen=True)
class Plan:
    """Cost of all cells of a grid, and the totals."""

    cells: tuple[CellCost, ...]
    left_out: tuple[str, ...]  # cells above ladder.max_cell_flops
    device: str  # devices of the calibration in use; empty if none is used
    n_trials: int  # trials per cell: more than one for a search (ASHA stops most of them early)
    n_slots: int  # number of workers that run at the same time
    wall_seconds: float | None  # on n_slots workers; excludes validation and the start of the workers
    notes: tuple[str, ...]  # recipes, steps of the learning rate, repeated data

    @property
    def flops(self) -> float:
        """Training FLOPs of all cells, if no trial stops early."""
        return self.n_trials * sum(cell.flops for cell in self.cells)

    @property
    def executed_flops(self) -> float:
        """Training FLOPs that are executed for all cells, if no trial stops early."""
        return self.n_trials * sum(cell.executed_flops for cell in self.cells)

    @property
    def saved_share(self) -> float:
        """Fraction of the FLOPs that shared trunks save, compared with independent runs."""
        unshared = sum(cell.flops * cell.steps / (cell.steps - cell.shared_steps) for cell in self.cells)
        return 1 - self.flops / (self.n_trials * unshared)

    @property
    def worker_seconds(self) -> float | None:
        """Total worker-seconds of all cells; None if the time of a cell is unknown."""
        known = [cell.seconds * cell.n_workers for cell in self.cells if cell.seconds is not None]
        return self.n_trials * sum(known) if len(known) == len(self.cells) else None

    def totals(self) -> dict[str, Any]:
        """The totals by name, for JSON output."""
        names = ("n_trials", "n_slots", "wall_seconds", "flops", "executed_flops", "saved_share", "worker_seconds", "price")
        return {name: getattr(self, name) for name in (*names, "device", "left_out", "notes")}

    @property
    def price(self) -> float | None:
        """Total price at plan.price_per_worker_hour; None if it is unknown."""
        known = [cell.price for cell in self.cells if cell.price is not None]
        return self.n_trials * sum(known) if len(known) == len(self.cells) else None


def vocab_tokens(config: Config) -> int:
    """Vocabulary size of the prepared corpus, or of the tokenizer's settings if no corpus is prepared."""
    corpus = prepared_corpus(config)
    return corpus.vocab_tokens if corpus else configured_vocab_size(config.data.tokenizer)


def plan(config: Config) -> Plan:
    """Plans the ladder, the search or the single run of a configuration. Raises ConfigError, as `grid` does."""
    corpus = prepared_corpus(config)
    cells, left_out = grid(config, corpus.vocab_tokens if corpus else configured_vocab_size(config.data.tokenizer))
    calibration = read_calibration(config.storage_folder)
    trunks = _trunks(cells)
    shared = _shared_steps(cells, trunks)
    epochs = [epochs_of(cell, corpus) if corpus else None for cell in cells]
    costs = tuple(_cell_cost(cell, shared[i], epochs[i], calibration) for i, cell in enumerate(cells))
    names_left_out = tuple(f"{c.shape.family} N={c.config.model.n_params:,} D={c.config.train.tokens:,}" for c in left_out)
    planned = {(cell.shape.family, cell.config.train.precision) for cell in cells}
    used = [] if config.plan.flops_per_second else [m for m in calibration if m.speed_group[:2] in planned]
    device = " and ".join(dict.fromkeys(m.device for m in used))
    n_trials = config.tune.n_trials if config.tune and not config.ladder else 1
    n_slots = config.plan.n_slots or max(cost.n_workers for cost in costs)
    wall_seconds = _wall_seconds(costs, trunks * n_trials, n_slots)
    return Plan(costs, names_left_out, device, n_trials, n_slots, wall_seconds, plan_notes(config, cells, corpus))


def step_seconds(cell: GridCell, calibration: Sequence[StepTime]) -> float | None:
    """Estimated seconds of one optimizer step; None if nothing is known.

    Takes the first of these that is available: plan.flops_per_second; the measured time of the same step; the measured speeds
    of the same family at other sizes. Speeds are executed FLOP/s. They are interpolated in log N, and are constant beyond the
    measured sizes.
    """
    config, step = cell.config, step_settings(cell)
    flops = executed_step_flops(step)
    if config.plan.flops_per_second:
        return flops / config.plan.flops_per_second
    if exact := [m for m in calibration if m.step == step]:
        return exact[-1].step_seconds
    speeds = {
        m.n_params: math.log(executed_step_flops(m.step) / m.step_seconds)
        for m in calibration
        if m.n_params and m.speed_group == StepTime(step, "", 0, 0).speed_group
    }
    if not speeds:
        return None
    points = sorted((math.log(n), speed) for n, speed in speeds.items())
    return flops / math.exp(_interpolate(points, math.log(accounting.parameters(cell.shape).non_embedding)))


def read_calibration(folder: Folder) -> list[StepTime]:
    """The measured step times of a storage folder, oldest first; an empty list without a calibration.

    Raises ConfigError if the file is damaged.
    """
    path = folder / CALIBRATION
    if not path.exists():
        return []
    try:
        return [StepTime(**known_fields(StepTime, row)) for row in json.loads(path.read_text())]
    except (ValueError, TypeError, AttributeError) as e:
        raise ConfigError(f"{path} is damaged; delete it and run lmu-dist plan --calibrate again") from e


def write_calibration(folder: Folder, step_times: Sequence[StepTime]) -> Folder:
    """Adds step times to the calibration file. They replace older ones of the same step. Returns the file.

    Commands on one machine that calibrate at the same time keep each other's results.
    """
    state_dir, path = storage.local_state_dir(folder), folder / CALIBRATION
    storage.make_folder(state_dir)
    with FileLock(state_dir / f"{CALIBRATION}.lock"):
        latest = {json.dumps(m.step, sort_keys=True): asdict(m) for m in [*read_calibration(folder), *step_times]}
        storage.write_atomic(path, json.dumps(list(latest.values()), indent=1).encode())
    return path


def _trunks(cells: list[GridCell]) -> list[list[int]]:
    """Indices of the cells of every trunk, fewest steps first. The trunks are in the order of their first cells."""
    trunks: dict[str, list[int]] = {}
    for i, cell in enumerate(cells):
        tree = to_dict(cell.config)
        trunk = json.dumps([tree["model"], tree["seed"], trunk_settings(tree["train"])], sort_keys=True)
        trunks.setdefault(trunk, []).append(i)
    return [sorted(trunk, key=lambda i: cells[i].config.train.n_steps) for trunk in trunks.values()]


def _shared_steps(cells: list[GridCell], trunks: list[list[int]]) -> dict[int, int]:
    """Number of shared steps by cell index: the steps that a cell of the same trunk with fewer tokens takes."""
    shared = dict.fromkeys(range(len(cells)), 0)
    for trunk in trunks:
        for shorter, longer in pairwise(trunk):
            shared[longer] = cells[shorter].config.train.decay_start
    return shared


def _wall_seconds(costs: Sequence[CellCost], trunks: list[list[int]], n_slots: int) -> float | None:
    """Time until the last trunk ends, if every trunk starts as soon as enough slots are free.

    None if a time is unknown, or if a trunk needs more workers than there are slots.
    """
    waiting = [(costs[trunk[0]].n_workers, [costs[i].seconds for i in trunk]) for trunk in trunks]
    now, free, running = 0.0, n_slots, list[tuple[float, int]]()
    while waiting or running:
        for trunk in [w for w in waiting if w[0] <= n_slots and None not in w[1]]:
            n_workers, seconds = trunk
            if n_workers <= free:
                waiting.remove(trunk)
                free -= n_workers
                heapq.heappush(running, (now + sum(s for s in seconds if s is not None), n_workers))
        if not running:
            return None
        now, n_workers = heapq.heappop(running)
        free += n_workers
    return now


def _cell_cost(cell: GridCell, shared_steps: int, epochs: float | None, calibration: list[StepTime]) -> CellCost:
    config, shape = cell.config, cell.shape
    train, workers = config.train, config.cluster.n_workers
    counts, flops = accounting.parameters(shape), accounting.flops(shape)
    rate = config.plan.price_per_worker_hour
    steps, seconds_each = train.n_steps - shared_steps, step_seconds(cell, calibration)
    micro_rows = config.cluster.micro_batch_rows or -(-train.batch_rows // workers)
    memory = accounting.worker_bytes(shape, micro_rows, train, config.cluster)
    available_bytes = config.plan.worker_memory_bytes * (config.cluster.gpus_per_worker or 1)
    seconds = seconds_each * steps if seconds_each is not None else None
    return CellCost(
        family=shape.family,
        n_params=counts.non_embedding,
        n_params_with_head=counts.with_head,
        d_model=shape.d_model,
        widths=dict(shape.widths),
        tokens=train.tokens,
        epochs=epochs,
        seed=config.seed,
        steps=train.n_steps,
        shared_steps=shared_steps,
        batch_tokens=train.batch_tokens,
        learning_rate=train.peak_rate,
        first_learning_rate=train.plateaus[0][1] if train.schedule == "wsd" else train.peak_rate,
        n_workers=workers,
        flops=steps * train.batch_tokens * flops.training,
        executed_flops=steps * workers * executed_step_flops(step_settings(cell)),
        flops_kaplan=steps * train.batch_tokens * flops.training_kaplan,
        memory_bytes=memory,
        host_bytes=accounting.host_bytes(shape, train, config.cluster),
        smallest_stage=next((s for s in STAGES if memory[s] <= available_bytes), None),
        zero_stage=config.cluster.zero_stage,
        step_seconds=seconds_each,
        seconds=seconds,
        price=seconds / 3600 * workers * rate if seconds is not None and rate else None,
    )


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Piecewise linear interpolation between sorted points, constant outside them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
