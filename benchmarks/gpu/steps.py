"""Part `steps`: whole training steps of the DeepSpeed engine in bf16 over the number of parameters, V = 50,257, n = 1,024.

Shares of the matmul peak are by the FLOPs that studies count and by those that are executed (models/accounting). Called by
part.py.
"""

import statistics

import torch
from measure import DTYPES, matmul_flops, seconds

from gpu.recorder import Recorder
from gpu.training import fitting_rows, planned_bytes, process_group, random_batch, settings
from lmu_dist.models import accounting
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import shape_for

FAMILIES = ("transformer", "lmu", "lmu_attention", "lstm")  # the others are compared with the first
MODERN, MODERN_SIZES = ("llama", "lmu_modern", "gated_deltanet", "mamba2"), (1_000_000, 10_000_000)
SIZES, VOCABULARY, LENGTH, MAX_ROWS = (100_000, 1_000_000, 10_000_000, 100_000_000), 50_257, 1024, 64
TOY_SIZES, TOY_VOCABULARY, TOY_LENGTH, TOY_ROWS = (3_000, 10_000), 512, 64, 2
LARGEST_LSTM = 1_000_000  # above, an LSTM takes minutes
WARM_UP_STEPS, MEASURED_STEPS, PRECISION, LEARNING_RATE = 3, 5, "bf16", 1e-4


def run(recorder: Recorder) -> None:
    """Measures all families and sizes."""
    device = recorder.device
    peak = matmul_flops(DTYPES["bfloat16"], device, recorder.toy)
    recorder.row("peaks", peak="matmul bfloat16", flops_per_second=peak)
    sizes, vocabulary, length = (TOY_SIZES, TOY_VOCABULARY, TOY_LENGTH) if recorder.toy else (SIZES, VOCABULARY, LENGTH)
    with process_group(device):
        for n_params in sizes[:1] if recorder.fast else sizes:
            speeds = dict[str, float]()
            modern = MODERN if recorder.toy or n_params in MODERN_SIZES else ()
            for family in FAMILIES[:2] if recorder.fast else (*FAMILIES, *modern):
                if family == "lstm" and n_params > LARGEST_LSTM:
                    continue
                with recorder.attempt(f"{family} N={n_params:,}"):
                    shape = shape_for(family, n_params, vocab_tokens=vocabulary, sequence_tokens=length)
                    speeds[family] = _measure(recorder, shape, n_params, peak, speeds.get(FAMILIES[0]))


def _measure(recorder: Recorder, shape: Shape, n_params: int, peak: float, base_speed: float | None) -> float:
    """Adds the row of a model and returns its tokens/s. Takes fewer rows if the memory does not suffice."""
    device, on_gpu = recorder.device, recorder.device.type == "cuda"
    n_rows = fitting_rows(shape, PRECISION, device, TOY_ROWS if recorder.toy else MAX_ROWS)
    while True:
        try:
            step_seconds, peak_bytes = time_steps(shape, n_rows, device)
            break
        except torch.OutOfMemoryError:
            if n_rows == 1:
                raise
        # Outside of the handler: the error refers to the tensors of the failed step.
        torch.cuda.empty_cache()
        recorder.note(f"{shape.family} N={n_params:,}: out of memory with {n_rows} rows, which should fit by plan")
        n_rows //= 2
    speed = n_rows * shape.sequence_tokens / step_seconds
    counted, executed = accounting.flops(shape).training, accounting.executed_flops(shape, n_rows, on_gpu)
    planned = planned_bytes(shape, n_rows, PRECISION, 0, device)
    recorder.row(
        "steps",
        family=shape.family,
        n_params=n_params,
        rows=n_rows,
        tokens_per_second=speed,
        speed_against_transformer=speed / base_speed if base_speed else None,
        counted_share_of_matmul_peak=counted * speed / peak,
        executed_share_of_matmul_peak=executed * speed / peak,
        executed_over_counted=executed / counted,
        peak_bytes=peak_bytes,
        memory_over_plan=peak_bytes / planned if peak_bytes else None,
    )
    return speed


def time_steps(shape: Shape, n_rows: int, device: torch.device) -> tuple[float, float | None]:
    """Median seconds of a step at ZeRO stage 0, and its peak memory in bytes, which is known of GPUs only."""
    from lmu_dist.train.engine import Engine

    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    engine = Engine(LanguageModel(shape), *settings(shape, n_rows, PRECISION, 0, device), device)
    try:
        batch = random_batch(shape, n_rows, 0)
        for _ in range(WARM_UP_STEPS):
            engine.step(batch, LEARNING_RATE)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = [seconds(lambda: engine.step(batch, LEARNING_RATE), device) for _ in range(MEASURED_STEPS)]
        peak = float(torch.cuda.max_memory_allocated(device) - before) if device.type == "cuda" else None
        return statistics.median(times), peak
    finally:
        engine.close()
