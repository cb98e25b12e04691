"""Part `engine`: the DeepSpeed engine at ZeRO stages 0 to 3 against plain torch, on the same batches. Called by part.py."""

import gc
import statistics
from collections.abc import Callable

import torch
from measure import synchronized
from steps import Training

from gpu.recorder import Recorder
from gpu.training import PRECISIONS, planned_bytes, process_group, random_batch, settings
from lmu_dist.data.batches import Batch
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import shape_for

FAMILIES, STAGES = ("transformer", "lmu"), (0, 1, 2, 3)
N_STEPS, WARM_UP_STEPS, LEARNING_RATE = 8, 3, 1e-3
# (precision, N, rows): float32 compares losses, bf16 speeds too
CASES, VOCABULARY, LENGTH = (("fp32", 1_000_000, 4), ("bf16", 10_000_000, 16)), 50_257, 1024
TOY_CASES, TOY_VOCABULARY, TOY_LENGTH = (("fp32", 3_000, 2), ("bf16", 3_000, 2)), 512, 64
BOUNDS = {"fp32": 1e-4, "bf16": 0.05}  # of the difference of a loss in nats: float sums in another order; roundings
Step = Callable[[Batch], float]


def run(recorder: Recorder) -> None:
    """Compares all stages for each case and family."""
    cases, vocabulary, length = (TOY_CASES, TOY_VOCABULARY, TOY_LENGTH) if recorder.toy else (CASES, VOCABULARY, LENGTH)
    with process_group(recorder.device):
        for precision, n_params, n_rows in cases[:1] if recorder.fast else cases:
            for family in FAMILIES[1:] if recorder.fast else FAMILIES:
                with recorder.attempt(f"{family} {precision}"):
                    shape = shape_for(family, n_params, vocab_tokens=vocabulary, sequence_tokens=length)
                    _compare(recorder, shape, precision, n_rows)


def _compare(recorder: Recorder, shape: Shape, precision: str, n_rows: int) -> None:
    pair = [random_batch(shape, n_rows, recorder.seed + i) for i in range(2)]
    batches = [pair[i % 2] for i in range(N_STEPS)]
    expected, plain_speed = list[float](), 0.0
    for stage in (None, *STAGES):
        name = "plain torch" if stage is None else f"ZeRO {stage}"
        with recorder.attempt(f"{shape.family} {precision} {name}"):
            make = _plain_step if stage is None else _engine_step
            losses, spent, peak = _train(
                lambda s=stage, m=make: m(shape, precision, n_rows, s, recorder.device), batches, recorder
            )
            speed = n_rows * shape.sequence_tokens / spent
            if stage is None:
                expected, plain_speed = losses, speed
                falls = losses[-1] < losses[1]  # of the second batch
                recorder.expect(falls, f"{shape.family} {precision}: the loss does not fall: {losses}")
            difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
            planned = planned_bytes(shape, n_rows, precision, stage, recorder.device) if stage is not None else None
            recorder.row(
                "engine",
                family=shape.family,
                precision=precision,
                loop=name,
                rows=n_rows,
                tokens_per_second=speed,
                speed_against_plain=speed / plain_speed,
                peak_bytes=peak,
                memory_over_plan=peak / planned if peak and planned else None,
                loss_difference_nats=difference,
                last_loss_nats=losses[-1],
            )
            recorder.expect(
                difference < BOUNDS[precision], f"{shape.family} {precision} {name}: losses differ by {difference:.1e} nats"
            )


def _train(
    make: Callable[[], tuple[Step, Callable[[], None]]], batches: list[Batch], recorder: Recorder
) -> tuple[list[float], float, float | None]:
    """Losses of all batches, median seconds of a step after the first ones, and peak bytes of these (of GPUs only)."""
    device, on_gpu = recorder.device, recorder.device.type == "cuda"
    gc.collect()  # the engine of the stage before
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    step, close = make()
    losses, times = list[float](), list[float]()
    try:
        for i, batch in enumerate(batches):
            if on_gpu and i == WARM_UP_STEPS:
                torch.cuda.reset_peak_memory_stats(device)
            began = synchronized(device)
            losses.append(step(batch))
            times.append(synchronized(device) - began)
        peak = float(torch.cuda.max_memory_allocated(device) - before) if on_gpu else None
    finally:
        close()
    return losses, statistics.median(times[WARM_UP_STEPS:]), peak


def _plain_step(
    shape: Shape, precision: str, n_rows: int, stage: int | None, device: torch.device
) -> tuple[Step, Callable[[], None]]:
    """A step in plain torch: Adam, on float32 master weights if the model is in bf16."""
    training = Training(shape, PRECISIONS[precision], n_rows, device)
    for group in training.adam.param_groups:
        group["lr"] = LEARNING_RATE

    def step(batch: Batch) -> float:
        loss = training.model(batch.inputs.to(device), batch.targets.to(device)).sum() / batch.targets.numel()
        loss.backward()
        training.update()
        return loss.item()

    return step, lambda: None


def _engine_step(
    shape: Shape, precision: str, n_rows: int, stage: int | None, device: torch.device
) -> tuple[Step, Callable[[], None]]:
    """A step of the DeepSpeed engine."""
    from lmu_dist.train.engine import Engine

    assert stage is not None
    engine = Engine(LanguageModel(shape), *settings(shape, n_rows, precision, stage, device), device)
    return lambda batch: engine.step(batch, LEARNING_RATE)[0], engine.close
