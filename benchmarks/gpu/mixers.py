"""Part `mixers`: what mixes the tokens in a block of each family, forward and backward in bf16, over sequence length and width.

A mixer is all sublayers of one block except the feed-forward ones: the LMU; attention and LMU; attention, by flash SDPA; the
LSTM, by cuDNN. All rows of a table have the same number of tokens per call. Called by part.py.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from measure import copy_bytes, interleaved, matmul_flops, peak_bytes, seconds
from mixers import CostHistory
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.recorder import Recorder
from lmu_dist.models import accounting, registry
from lmu_dist.models.mixers.feed_forward import FeedForward
from lmu_dist.models.shape import Shape

FAMILIES = ("lmu", "lmu_attention", "transformer")
LSTM = "lstm"  # measured last: it takes as long as all others together
LENGTHS, WIDTHS, N_TOKENS, WINDOW = (1024, 2048, 4096, 8192, 16384), (204, 648, 2048), 16384, 1024
TOY_LENGTHS, TOY_WIDTHS, TOY_TOKENS, TOY_WINDOW = (64, 128, 256), (24,), 256, 64
DTYPE = torch.bfloat16
BUDGET_SECONDS = 2.0  # of one call: longer ones are left out
RESERVED_SECONDS = 5.0  # of the part's time, for the last measurement


@dataclass
class MixerRun:
    """A mixer and its input. A call runs forward and backward, with new gradients."""

    module: nn.Module
    x: Tensor
    dout: Tensor
    backend: SDPBackend | None = None  # the only one that scaled_dot_product_attention may use

    def __call__(self) -> None:
        """Computes the gradients of all parameters and of the input."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        with sdpa_kernel(self.backend) if self.backend is not None else nullcontext():
            self.module(self.x).backward(self.dout)


def shape_of(family: str, d_model: int, n: int, window: int) -> Shape:
    """The shape of one block with the family's own rules for widths. The memory's window does not grow with n."""
    widths = registry.find(family).widths(d_model, window, registry.find(family).Options())
    if widths is None:
        raise ValueError(f"{family} cannot have d = {d_model}")
    # An LSTM as wide as its input, as in benchmarks/mixers.py.
    return Shape(family, d_model, 1, n, 1, widths | ({"d_hidden": d_model} if "d_hidden" in widths else {}))


def build(shape: Shape, n_rows: int, device: torch.device) -> MixerRun:
    """The mixer of a shape with random weights and inputs, in bf16."""
    torch.manual_seed(0)
    family = registry.family_of(shape)
    sublayers = [s for s in family.sublayers(shape, family.Options()) if not isinstance(s, FeedForward)]
    module = nn.Sequential(*sublayers).to(device, DTYPE)
    x, dout = (torch.randn(n_rows, shape.sequence_tokens, shape.d_model, device=device, dtype=DTYPE) for _ in range(2))
    return MixerRun(module, x.requires_grad_(), dout)


def training_flops(shape: Shape, n_rows: int, on_gpu: bool) -> tuple[float, float]:
    """FLOPs per token of a mixer, forward and backward: as studies count them, and those of the operations that run."""
    narrow = shape.with_widths(d_ff=1) if "d_ff" in shape.widths else shape  # the feed-forward layers then hardly count
    return accounting.flops(narrow).training, accounting.executed_flops(narrow, n_rows, on_gpu)


def traffic_bytes(run: MixerRun) -> float:
    """Bytes that must be moved at least: x, the output and their gradients once, weights twice, their gradients once."""
    weights = sum(p.numel() * p.element_size() for p in run.module.parameters())
    return 4 * run.x.numel() * run.x.element_size() + 3 * weights


class _Sweep:
    """Measures families at widths and lengths, interleaved at each, until the part's time is used up."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.device = recorder, recorder.device
        self.window, self.n_tokens = (TOY_WINDOW, TOY_TOKENS) if recorder.toy else (WINDOW, N_TOKENS)
        self.matmul_peak = matmul_flops(DTYPE, self.device, recorder.toy)
        self.copy_peak = copy_bytes(self.device, recorder.toy)
        self.speeds = dict[tuple[int, str, int], float]()  # tokens/s by (d, family, n)
        recorder.row("peaks", peak="matmul bfloat16", flops_per_second=self.matmul_peak)
        recorder.row("peaks", peak="copy, read and written", bytes_per_second=self.copy_peak)

    def measure(self, families: Sequence[str], d_model: int, lengths: Sequence[int]) -> None:
        """Adds a row for each family and length."""
        costs = {family: CostHistory([], []) for family in families}
        for n in lengths:
            runs = dict[str, MixerRun]()
            for family in list(costs):
                if self.recorder.seconds_left < RESERVED_SECONDS + 3 * (costs[family].seconds or [0.0])[-1]:
                    self.recorder.note(f"{family} from d = {d_model}, n = {n:,} on: out of time")
                    del costs[family]
                elif costs[family].seconds and 2 * costs[family].seconds[-1] > BUDGET_SECONDS:
                    self.recorder.note(f"{family} d = {d_model} from n = {n:,} on: a call would take over {BUDGET_SECONDS} s")
                    del costs[family]
                else:
                    with self.recorder.attempt(f"{family} d={d_model} n={n:,}"):
                        runs[family] = self._warm(family, d_model, n)
            self._time(runs, costs, d_model, n)

    def _warm(self, family: str, d_model: int, n: int) -> MixerRun:
        """A run that has been called: constants are cached and kernels compiled. On a GPU attention must be flash attention."""
        run = build(shape_of(family, d_model, n, self.window), max(1, self.n_tokens // n), self.device)
        run.backend = SDPBackend.FLASH_ATTENTION if self.device.type == "cuda" else None
        try:
            run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            if run.backend is None:
                raise
            run.backend = None
            self.recorder.note(f"{family} d={d_model} n={n:,}: not flash attention: {' '.join(str(e).split())[:200]}")
            run()
        return run

    def _time(self, runs: dict[str, MixerRun], costs: dict[str, CostHistory], d_model: int, n: int) -> None:
        first = {family: seconds(run, self.device) for family, run in runs.items()}
        repeats = {family: 2 if self.recorder.toy else 7 if spent < 0.1 else 3 for family, spent in first.items()}
        times = interleaved(runs, self.device, repeats) if runs else {}
        for family, run in runs.items():
            spent = statistics.median(times[family])
            costs[family].seconds.append(spent)
            n_rows = run.x.shape[0]
            n_tokens = n_rows * n
            shape = shape_of(family, d_model, n, self.window)
            counted, executed = training_flops(shape, n_rows, self.device.type == "cuda")
            self.speeds[d_model, family, n] = n_tokens / spent
            self.recorder.row(
                "mixers",
                family=family,
                d=d_model,
                n=n,
                tokens_per_second=n_tokens / spent,
                peak_bytes=peak_bytes(run, self.device),
                counted_share_of_matmul_peak=counted * n_tokens / spent / self.matmul_peak,
                executed_share_of_matmul_peak=executed * n_tokens / spent / self.matmul_peak,
                share_of_copy_peak=traffic_bytes(run) / spent / self.copy_peak,
            )


def crossover(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Length from which on the ratio of speeds is above 1 up to the longest, interpolated in logarithms; None: never.

    If it is above 1 at all lengths, the shortest length.
    """
    if not ratios or ratios[-1] <= 1:
        return None
    points = [(math.log(n), math.log(ratio)) for n, ratio in zip(lengths, ratios, strict=True)]
    for (x0, y0), (x1, y1) in reversed(list(itertools.pairwise(points))):
        if y0 <= 0:
            return math.exp(x0 + (x1 - x0) * -y0 / (y1 - y0))
    return float(lengths[0])


def run(recorder: Recorder) -> None:
    """Measures all mixers, then says from which n on the LMU is faster than attention."""
    sweep: Any = _Sweep(recorder)
    lengths, widths = (TOY_LENGTHS, TOY_WIDTHS) if recorder.toy else (LENGTHS, WIDTHS)
    lengths = lengths[:2] if recorder.fast else lengths
    for d_model in widths:
        sweep.measure(FAMILIES, d_model, lengths)
        measured = [n for n in lengths if {(d_model, f, n) for f in ("lmu", "transformer")} <= set(sweep.speeds)]
        ratios = [sweep.speeds[d_model, "lmu", n] / sweep.speeds[d_model, "transformer", n] for n in measured]
        if measured:
            tokens = crossover(measured, ratios)
            recorder.row("LMU against attention", d=d_model, to_n=measured[-1], overtakes_tokens=tokens, speed_ratio=ratios[-1])
    for d_model in widths:
        sweep.measure([LSTM], d_model, lengths)
