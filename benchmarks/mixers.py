"""Section `mixers` of speed.py: forward and backward pass of one mixer of every kind, and of the LMU in all its forms.

Tables: `points` over n tokens in one row, `exponents` of time and memory in n, `overtaking` (the n from which the LMU is faster
than attention), `headline` (2 x 1,024 tokens, the fused form against the fft form, errors against the float64 oracle).
Called by section.py. Legend: n tokens of a row, d width, q order.
"""

import importlib
import inspect
import itertools
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measure import (
    DTYPES,
    Row,
    Section,
    available_bytes,
    dtype_notes,
    dtypes,
    exponent,
    interleaved,
    peak_bytes,
    ratio,
    seconds,
)
from oracle import lmu_block
from torch import Tensor, nn


def _mixer_module(name: str, old_name: str) -> Any:
    try:
        return importlib.import_module(f"lmu_dist.models.mixers.{name}")
    except ModuleNotFoundError:  # revisions before models/mixers
        return importlib.import_module(f"lmu_dist.models.{old_name}")


lmu = _mixer_module("lmu.mixer", "lmu")
FORMS: tuple[str, ...] = getattr(lmu, "FORMS", ("recurrent", "fft"))  # revisions before the chunked form have no list
MIXERS = (*(f"lmu {form}" for form in FORMS), "attention", "lstm")
LENGTHS, QUICK_LENGTHS = tuple(256 << i for i in range(7)), (64, 128, 256)
EXPONENT_RANGE = (1024, 16384)  # tokens between which exponents are measured
BUDGET_SECONDS = 10.0  # of one run: a length that would take longer, extrapolated from the lengths before, is skipped
BUDGET_SHARE = 0.5  # of the free memory, likewise


@dataclass(frozen=True)
class Widths:
    """Widths of the mixers under test."""

    d_model: int
    sequence_tokens: int
    n_heads: int
    d_hidden: int
    order: int
    reduced_order: int
    theta_tokens: int


WIDTHS = Widths(204, 1024, n_heads=4, d_hidden=204, order=250, reduced_order=25, theta_tokens=1024)
QUICK_WIDTHS = Widths(24, 256, n_heads=2, d_hidden=24, order=40, reduced_order=4, theta_tokens=256)


@dataclass
class MixerRun:
    """A mixer and its input. A call runs forward and backward, with new gradients."""

    mixer: str
    module: nn.Module
    x: Tensor

    def __call__(self) -> None:
        """Computes the gradients of all parameters and of the input."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        self.forward().sum().backward()

    def forward(self) -> Tensor:
        """Output of the mixer, for an LMU in the form that its name says."""
        kind, *form = self.mixer.split()
        if kind == "lmu" and not hasattr(self.module, "form"):  # revisions whose layers take the form at each call
            return self.module(self.x, *form)
        return self.module(self.x)


def build_mixer(mixer: str, w: Widths) -> nn.Module:
    """The module of a mixer by its name in MIXERS."""
    kind, *form = mixer.split()
    if kind == "attention":
        return _mixer_module("attention", "attention").Attention(w.d_model, w.n_heads)
    if kind == "lstm":
        return _mixer_module("lstm", "lstm").LSTM(w.d_model, w.d_hidden, 1)
    form = form if "form" in inspect.signature(lmu.LMU).parameters else []
    return lmu.LMU(w.order, w.reduced_order, float(w.theta_tokens), *form)


def mixer_run(mixer: str, dtype: torch.dtype, rows: int, n: int, widths: Widths, device: torch.device) -> MixerRun:
    """A run with the same weights and the same input for every form and precision, except for rounding."""
    torch.manual_seed(0)
    module = build_mixer(mixer, widths).to(device, dtype)
    x = torch.randn(rows, n, widths.d_model, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return MixerRun(mixer, module, x.requires_grad_())


@dataclass
class CostHistory:
    """Time and memory of a mixer at the lengths measured so far, from which those at twice the length are extrapolated."""

    seconds: list[float]
    bytes: list[float]

    def skip_reason(self, free: float) -> str | None:
        """Why the next length is skipped; None if it is within the budget."""
        if not self.seconds:
            return None
        if (time := _extrapolate(self.seconds)) > BUDGET_SECONDS:
            return f"would take {time:.0f} s"
        if self.bytes and (memory := _extrapolate(self.bytes)) > BUDGET_SHARE * free:
            return f"would take {memory / 1e9:.0f} GB"
        return None


def _extrapolate(values: list[float]) -> float:
    growth = values[-1] / values[-2] if len(values) > 1 and values[-2] else 2.0
    return values[-1] * min(max(2.0, growth), 4.0)  # no mixer grows faster than attention, by 4


def points(lengths: tuple[int, ...], widths: Widths, device: torch.device, quick: bool) -> tuple[list[Row], list[str]]:
    """Tokens/s and peak memory of every mixer, precision and n, and notes on skipped lengths."""
    history = {(mixer, name): CostHistory([], []) for mixer in MIXERS for name in dtypes(device)}
    rows, notes, stopped = list[Row](), list[str](), set[tuple[str, str]]()
    for n in lengths:
        print(f"n = {n:,}", file=sys.stderr, flush=True)
        runs, peaks, repeats = {}, {}, {}
        for key, costs in history.items():
            if key in stopped:
                continue
            if reason := costs.skip_reason(available_bytes(device)):
                notes.append(f"{' '.join(key)} from n = {n:,} on: {reason}")
                stopped.add(key)
                continue
            run = mixer_run(key[0], DTYPES[key[1]], 1, n, widths, device)
            with torch.no_grad():  # creates cached constants, which are no activations
                run.forward()
            peaks[key] = peak_bytes(run, device)
            first = seconds(run, device) if not costs.seconds or costs.seconds[-1] < 1 else 2 * costs.seconds[-1]
            runs[key], repeats[key] = run, 2 if quick else 5 if first < 0.5 else 3 if first < 3 else 1
        times = interleaved(runs, device, repeats)
        for key in history:
            row: Row = {"mixer": key[0], "dtype": key[1], "n": n, "tokens_per_second": None, "peak_bytes": None}
            if key in times:
                median = statistics.median(times[key])
                history[key].seconds.append(min(times[key]))  # the fastest repeat is the least disturbed
                if (peak := peaks[key]) is not None:
                    history[key].bytes.append(peak)
                row |= {"tokens_per_second": n / median, "peak_bytes": peaks[key]}
            rows.append(row)
    return rows, notes


def exponents(rows: list[Row], lengths: tuple[int, ...]) -> list[Row]:
    """Exponents of time and memory in n, over EXPONENT_RANGE; `to_tokens` is the longest n measured."""
    results = list[Row]()
    for mixer in MIXERS:
        for name in dict.fromkeys(r["dtype"] for r in rows):
            measured = [
                r for r in rows if (r["mixer"], r["dtype"]) == (mixer, name) and r["n"] in lengths and r["tokens_per_second"]
            ]
            row: Row = {"mixer": mixer, "dtype": name, "time_exponent": None, "memory_exponent": None, "to_tokens": None}
            if len(measured) > 2:
                n = [r["n"] for r in measured]
                row["time_exponent"] = exponent(n, [r["n"] / r["tokens_per_second"] for r in measured])
                if all(r["peak_bytes"] for r in measured):
                    row["memory_exponent"] = exponent(n, [r["peak_bytes"] for r in measured])
                row["to_tokens"] = float(n[-1])
            results.append(row)
    return results


def crossover_lengths(rows: list[Row]) -> list[Row]:
    """The n from which each form of the LMU stays faster than attention, with log n interpolated between measured points."""
    speed = {(r["mixer"], r["dtype"], r["n"]): r["tokens_per_second"] for r in rows}
    lengths = sorted({r["n"] for r in rows})
    results = list[Row]()
    for form in FORMS:
        for name in dict.fromkeys(r["dtype"] for r in rows):
            speeds = [(n, speed[f"lmu {form}", name, n], speed["attention", name, n]) for n in lengths]
            logs = [(np.log(n), np.log(a / b)) for n, a, b in speeds if a and b]
            log_n = None
            if logs and logs[-1][1] > 0:
                log_n = logs[0][0]
                for (n0, y0), (n1, y1) in itertools.pairwise(logs):
                    if y0 <= 0 < y1:
                        log_n = n0 + (n1 - n0) * -y0 / (y1 - y0)
            tokens = None if log_n is None else float(np.exp(log_n))
            results.append({"mixer": f"lmu {form}", "dtype": name, "overtakes_tokens": tokens})
    return results


def headline(widths: Widths, device: torch.device, quick: bool) -> list[Row]:
    """All mixers except the recurrent LMU on 2 x n tokens, against the fft form ("plain"), with interleaved repeats."""
    runs = {
        (mixer, name): mixer_run(mixer, dtype, 2, widths.sequence_tokens, widths, device)
        for mixer in MIXERS
        if mixer != "lmu recurrent"
        for name, dtype in dtypes(device).items()
    }
    peaks = {}
    for key, run in runs.items():
        with torch.no_grad():
            run.forward()
        peaks[key] = peak_bytes(run, device)
    times = interleaved(runs, device, 2 if quick else 7)
    expected, plain = expected_output(widths, device), "lmu fft"
    rows = list[Row]()
    for (mixer, name), durations in times.items():
        plain_peak, plain_peak_float32, peak = peaks[plain, name], peaks[plain, "float32"], peaks[mixer, name]
        rows.append(
            {
                "mixer": mixer,
                "dtype": name,
                "tokens_per_second": 2 * widths.sequence_tokens / statistics.median(durations),
                "speed_against_plain": ratio(times[plain, name], durations),
                "speed_against_plain_float32": ratio(times[plain, "float32"], durations),
                "peak_bytes": peak,
                "memory_against_plain": peak / plain_peak if peak is not None and plain_peak else None,
                "memory_against_plain_float32": peak / plain_peak_float32 if peak is not None and plain_peak_float32 else None,
                "error": relative_error(runs[mixer, name], expected) if mixer.startswith("lmu") else None,
            }
        )
    return rows


def expected_output(widths: Widths, device: torch.device) -> np.ndarray:
    """Output of the first row by the tests' float64 oracle, from weights and inputs that are not rounded to any precision."""
    run = mixer_run("lmu fft", torch.float32, 2, widths.sequence_tokens, widths, device)
    module: Any = run.module.double().cpu()
    x = run.x.detach()[:1].double().cpu()
    with torch.no_grad():
        # Revisions before projection_matrix call it reading_matrix.
        projection = module.projection_matrix if hasattr(module, "projection_matrix") else module.reading_matrix
        return lmu_block(x.numpy(), module.theta_tokens, projection.numpy(), module.bias.numpy(), module.p.numpy())["out"]


def relative_error(run: MixerRun, expected: np.ndarray) -> float:
    """Relative error of the first row in the 2-norm. In bfloat16 it includes the rounding of weights and inputs."""
    with torch.no_grad():
        got = run.forward()[:1].double().cpu().numpy()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def measure(device: torch.device, quick: bool) -> Section:
    """Runs the section."""
    widths, lengths = (QUICK_WIDTHS, QUICK_LENGTHS) if quick else (WIDTHS, LENGTHS)
    headline_rows = headline(widths, device, quick)
    rows, notes = points(lengths, widths, device, quick)
    fitted = lengths if quick else tuple(n for n in lengths if EXPONENT_RANGE[0] <= n <= EXPONENT_RANGE[1])
    tables = {"headline": headline_rows, "points": rows, "exponents": exponents(rows, fitted)}
    tables["overtaking"] = crossover_lengths(rows)
    missing = [f"form {form}: not in this revision" for form in ("chunked", "fused") if form not in FORMS]
    return Section(tables, notes + missing + dtype_notes(device))
