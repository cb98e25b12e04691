"""Section `mixers` of speed.py: forward and backward of one mixer of every family, the LMU in all its forms.

Tables: `points` over n tokens in one row, `exponents` of time and memory in n, `overtaking` (the n from which the LMU is faster
than attention), `headline` (2 x 1,024 tokens, the fused form against the plain one, errors against the float64 oracle).
Called by section.py. Legend: n tokens of a row, d width, q order.
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from measure import DTYPES, Row, Section, available_bytes, exponent, interleaved, peak_bytes, ratio, seconds
from oracle import lmu_block
from torch import Tensor, nn

from lmu_dist.models.lm import SUBLAYERS
from lmu_dist.models.mixers.lmu import mixer as lmu
from lmu_dist.models.shape import Shape

FORMS: tuple[str, ...] = getattr(lmu, "FORMS", ("recurrent", "fft"))  # revisions before the chunked form had no list
MIXERS = (*(f"lmu {form}" for form in FORMS), "attention", "lstm")
LENGTHS, QUICK_LENGTHS = tuple(256 << i for i in range(7)), (64, 128, 256)
FITTED = (1024, 16384)
BUDGET_SECONDS = 10.0  # of one run: what would take longer, by how it grew so far, is left out
BUDGET_SHARE = 0.5  # of the memory that is free
SHAPE = Shape("lmu", 204, 1, 1024, 256, n_heads=4, d_hidden=204, order=250, reduced_order=25, theta_tokens=1024)
QUICK_SHAPE = Shape("lmu", 24, 1, 256, 256, n_heads=2, d_hidden=24, order=40, reduced_order=4, theta_tokens=256)


@dataclass
class Job:
    """A mixer with its input: a call is forward and backward, gradients made anew."""

    mixer: str
    module: nn.Module
    x: Tensor

    def __call__(self) -> None:
        """All gradients, that of the input too."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        self.forward().sum().backward()

    def forward(self) -> Tensor:
        """In the form that the mixer's name says."""
        kind, *form = self.mixer.split()
        if kind == "lmu" and not hasattr(self.module, "form"):  # a revision whose layers are told the form at each call
            return self.module(self.x, *form)
        return self.module(self.x)


def job(mixer: str, dtype: torch.dtype, rows: int, n: int, shape: Shape, device: torch.device) -> Job:
    """The same weights and the same input for every form and precision, but for their rounding."""
    torch.manual_seed(0)
    kind, *form = mixer.split()
    told = [*form, None][:1] if hasattr(lmu, "mixed") else []
    module = cast(Callable[..., nn.Module], SUBLAYERS[kind])(shape, *told).to(device, dtype)
    x = torch.randn(rows, n, shape.d_model, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return Job(mixer, module, x.requires_grad_())


@dataclass
class Growth:
    """What a mixer took at each n so far; says what twice the n would take."""

    seconds: list[float]
    bytes: list[float]

    def refusal(self, free: float) -> str | None:
        """Why the next n is left out."""
        if not self.seconds:
            return None
        if (time := _doubled(self.seconds)) > BUDGET_SECONDS:
            return f"would take {time:.0f} s"
        if self.bytes and (memory := _doubled(self.bytes)) > BUDGET_SHARE * free:
            return f"would take {memory / 1e9:.0f} GB"
        return None


def _doubled(values: list[float]) -> float:
    growth = values[-1] / values[-2] if len(values) > 1 and values[-2] else 2.0
    return values[-1] * min(max(2.0, growth), 4.0)  # attention's is 4, and no mixer's is more


def points(lengths: tuple[int, ...], shape: Shape, device: torch.device, quick: bool) -> tuple[list[Row], list[str]]:
    """Tokens/s and peak memory of every mixer, precision and n."""
    growth = {(mixer, name): Growth([], []) for mixer in MIXERS for name in DTYPES}
    rows, notes, stopped = list[Row](), list[str](), set[tuple[str, str]]()
    for n in lengths:
        print(f"n = {n:,}", file=sys.stderr, flush=True)
        jobs, peaks, repeats = {}, {}, {}
        for key, grown in growth.items():
            if key in stopped:
                continue
            if why := grown.refusal(available_bytes(device)):
                notes.append(f"{' '.join(key)} from n = {n:,} on: {why}")
                stopped.add(key)
                continue
            run = job(key[0], DTYPES[key[1]], 1, n, shape, device)
            with torch.no_grad():  # constants that are kept are made here, and count as no activation
                run.forward()
            peaks[key] = peak_bytes(run, device)
            first = seconds(run, device) if not grown.seconds or grown.seconds[-1] < 1 else 2 * grown.seconds[-1]
            jobs[key], repeats[key] = run, 2 if quick else 5 if first < 0.5 else 3 if first < 3 else 1
        times = interleaved(jobs, device, repeats)
        for key in growth:
            row: Row = {"mixer": key[0], "dtype": key[1], "n": n, "tokens_per_second": None, "peak_bytes": None}
            if key in times:
                median = statistics.median(times[key])
                growth[key].seconds.append(min(times[key]))  # a disturbed repeat says nothing of the next n
                if (peak := peaks[key]) is not None:
                    growth[key].bytes.append(peak)
                row |= {"tokens_per_second": n / median, "peak_bytes": peaks[key]}
            rows.append(row)
    return rows, notes


def exponents(rows: list[Row], lengths: tuple[int, ...]) -> list[Row]:
    """Exponents of time and memory between FITTED; `to_tokens` says how far the points went."""
    found = list[Row]()
    for mixer in MIXERS:
        for name in DTYPES:
            mine = [
                r for r in rows if (r["mixer"], r["dtype"]) == (mixer, name) and r["n"] in lengths and r["tokens_per_second"]
            ]
            row: Row = {"mixer": mixer, "dtype": name, "time_exponent": None, "memory_exponent": None, "to_tokens": None}
            if len(mine) > 2:
                n = [r["n"] for r in mine]
                row["time_exponent"] = exponent(n, [r["n"] / r["tokens_per_second"] for r in mine])
                if all(r["peak_bytes"] for r in mine):
                    row["memory_exponent"] = exponent(n, [r["peak_bytes"] for r in mine])
                row["to_tokens"] = float(n[-1])
            found.append(row)
    return found


def overtaking(rows: list[Row]) -> list[Row]:
    """The n from which each form of the LMU stays faster than attention, between measured points by their logarithms."""
    speed = {(r["mixer"], r["dtype"], r["n"]): r["tokens_per_second"] for r in rows}
    lengths = sorted({r["n"] for r in rows})
    found = list[Row]()
    for form in FORMS:
        for name in DTYPES:
            gain = [(n, speed[f"lmu {form}", name, n], speed["attention", name, n]) for n in lengths]
            logs = [(np.log(n), np.log(a / b)) for n, a, b in gain if a and b]
            at = None
            if logs and logs[-1][1] > 0:
                at = logs[0][0]
                for (n0, y0), (n1, y1) in itertools.pairwise(logs):
                    if y0 <= 0 < y1:
                        at = n0 + (n1 - n0) * -y0 / (y1 - y0)
            found.append({"mixer": f"lmu {form}", "dtype": name, "overtakes_tokens": None if at is None else float(np.exp(at))})
    return found


def headline(shape: Shape, device: torch.device, quick: bool) -> list[Row]:
    """Every form but the recurrent at 2 x n tokens against the plain folded form ("fft"), repeats side by side."""
    jobs = {
        (mixer, name): job(mixer, dtype, 2, shape.sequence_tokens, shape, device)
        for mixer in MIXERS
        if mixer != "lmu recurrent"
        for name, dtype in DTYPES.items()
    }
    peaks = {}
    for key, run in jobs.items():
        with torch.no_grad():
            run.forward()
        peaks[key] = peak_bytes(run, device)
    times = interleaved(jobs, device, 2 if quick else 7)
    expected, plain = oracle(shape, device), "lmu fft"
    rows = list[Row]()
    for (mixer, name), spent in times.items():
        own, peak = peaks[plain, name], peaks[mixer, name]
        rows.append(
            {
                "mixer": mixer,
                "dtype": name,
                "tokens_per_second": 2 * shape.sequence_tokens / statistics.median(spent),
                "speed_against_plain": ratio(times[plain, name], spent),
                "speed_against_plain_float32": ratio(times[plain, "float32"], spent),
                "peak_bytes": peak,
                "memory_against_plain": peak / own if peak is not None and own else None,
                "memory_against_plain_float32": peak / first
                if peak is not None and (first := peaks[plain, "float32"])
                else None,
                "error": error(jobs[mixer, name], expected) if mixer.startswith("lmu") else None,
            }
        )
    return rows


def oracle(shape: Shape, device: torch.device) -> np.ndarray:
    """What the first row comes to, by the float64 reference of the tests, from weights and inputs that no precision rounds."""
    given = job("lmu fft", torch.float32, 2, shape.sequence_tokens, shape, device)
    module, x = cast(lmu.LMU, given.module.double().cpu()), given.x.detach()[:1].double().cpu()
    with torch.no_grad():
        reading, bias, p = module.reading_matrix.numpy(), module.bias.numpy(), module.p.numpy()
        return lmu_block(x.numpy(), module.theta_tokens, reading, bias, p)["out"]


def error(run: Job, expected: np.ndarray) -> float:
    """Relative, in the 2-norm, of the first row; in bfloat16 rounding of weights and inputs is in it."""
    with torch.no_grad():
        got = run.forward()[:1].double().cpu().numpy()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def measure(device: torch.device, quick: bool) -> Section:
    """The section."""
    shape, lengths = (QUICK_SHAPE, QUICK_LENGTHS) if quick else (SHAPE, LENGTHS)
    first = headline(shape, device, quick)
    rows, notes = points(lengths, shape, device, quick)
    fitted = lengths if quick else tuple(n for n in lengths if FITTED[0] <= n <= FITTED[1])
    tables = {"headline": first, "points": rows, "exponents": exponents(rows, fitted), "overtaking": overtaking(rows)}
    missing = [f"form {form}: not in this revision" for form in ("chunked", "fused") if form not in FORMS]
    return Section(tables, notes + missing)
