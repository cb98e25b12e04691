"""Sections `step`, `head` and `loader` of speed.py: a training step and its parts.

`step`: forward, backward and Adam by family, N, vocabulary and precision: tokens/s, share of the machine's matmul peak (by the
FLOPs that models count), and the share of each part, timed separately. `head`: the blocked cross-entropy over the vocabulary
against the plain one. `loader`: reading batches against the fastest step. Called by section.py.
"""

import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import (
    Row,
    Run,
    Section,
    available_bytes,
    dtype_notes,
    dtypes,
    interleaved,
    matmul_flops,
    peak_bytes,
    ratio,
    seconds,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.data.batches import row_indices
from lmu_dist.models.accounting import flops
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import shape_for

try:
    from lmu_dist.data.batches import TokenDataset
except ImportError:  # speed.py --base with a revision before it got this name
    from lmu_dist.data.batches import Rows as TokenDataset  # pyright: ignore[reportAttributeAccessIssue]
try:
    from lmu_dist.models.head import linear_cross_entropy
except ImportError:  # revisions before the blocked head
    linear_cross_entropy = None

N_ROWS, LENGTH = 2, 1024
FAMILIES = ("lmu", "lmu_attention", "transformer", "lstm")
SIZES, VOCABULARIES = (10_000, 100_000, 1_000_000), (50_257, 4_096)


class Training:
    """A model, one batch, and Adam; with float32 master weights, as in DeepSpeed, if the model is in lower precision."""

    def __init__(self, shape: Shape, dtype: torch.dtype, n_rows: int, device: torch.device) -> None:
        self.shape, self.model = shape, LanguageModel(shape).to(device, dtype)
        self.weights = list(self.model.parameters())
        low_precision = dtype != torch.float32
        self.masters = [w.detach().float().requires_grad_() for w in self.weights] if low_precision else self.weights
        self.adam = torch.optim.Adam(self.masters, 1e-4)
        rng = torch.Generator().manual_seed(0)
        tokens = torch.randint(shape.vocab_tokens, (n_rows, shape.sequence_tokens + 1), generator=rng).to(device)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def __call__(self) -> None:
        """One training step."""
        losses = self.model(self.inputs, self.targets)
        (losses.sum() / losses.numel()).backward()  # not mean(), as in train/engine
        self.update()

    def update(self) -> None:
        """Runs Adam and frees the gradients."""
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()
        self.adam.step()
        if self.masters is not self.weights:
            with torch.no_grad():
                for master, weight in zip(self.masters, self.weights, strict=True):
                    weight.copy_(master)
        self.model.zero_grad(set_to_none=True)

    def parts(self) -> dict[str, tuple[int, Run]]:
        """Kind of part -> (number of such parts in a step, function that runs one). A run is forward and backward of the part;
        the optimizer is the last entry.
        """
        model, shape = self.model, self.shape
        x = torch.randn(*self.inputs.shape, shape.d_model, device=self.inputs.device).to(self.weights[0].dtype)
        flat = self.targets.flatten()

        def through(module: Callable[[Tensor], Tensor]) -> Run:
            given = x.clone().requires_grad_()
            return lambda: module(given).sum().backward()

        def embedded() -> None:
            model.embedding(self.inputs).sum().backward()

        found: dict[str, tuple[int, Run]] = {"embedding": (1, embedded)}
        kinds = [type(module).__name__.lower() for module in model.sublayers]
        for kind, module in dict(zip(kinds, model.sublayers, strict=True)).items():
            found[kind] = (kinds.count(kind), through(module))
        found["norm"] = (sum(isinstance(norm, nn.LayerNorm) for norm in model.norms) + 1, through(model.norm))
        found["head"] = (1, through(lambda y: head_loss(y.flatten(0, 1), model.embedding.weight, flat)))
        found["optimizer"] = (1, self.update)
        return found


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy that the model of this revision uses."""
    return plain_loss(x, weight, targets) if linear_cross_entropy is None else linear_cross_entropy(x, weight, targets)


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with all logits in memory."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")


def shares(training: Training, step_seconds: float, device: torch.device, repeats: int) -> dict[str, float]:
    """Share of each kind of part in the summed time of all parts. `parts_over_step` is that sum over the time of a step."""
    parts = training.parts()
    runs = {kind: run for kind, (_, run) in parts.items() if kind != "optimizer"}
    for run in runs.values():
        run()
    spent = {kind: statistics.median(times) for kind, times in interleaved(runs, device, repeats).items()}
    updates = list[float]()
    for _ in range(repeats):
        for weight in training.weights:  # an update needs gradients, and the separate parts leave none
            weight.grad = torch.zeros_like(weight)
        updates.append(seconds(training.update, device))
    spent["optimizer"] = statistics.median(updates)
    spent = {kind: parts[kind][0] * time for kind, time in spent.items()}
    total = sum(spent.values())
    return {f"{kind}_share": time / total for kind, time in spent.items()} | {"parts_over_step": total / step_seconds}


def step(device: torch.device, quick: bool) -> Section:
    """Section `step`: speed of training steps and the shares of their parts."""
    sizes, vocabularies, length = ((10_000,), (512,), 128) if quick else (SIZES, VOCABULARIES, LENGTH)
    repeats = 2 if quick else 5
    peaks = {name: matmul_flops(dtype, device, quick) for name, dtype in dtypes(device).items()}
    rows = list[Row]()
    for vocabulary, n_params, (name, dtype) in itertools.product(vocabularies, sizes, dtypes(device).items()):
        shapes = [shape_for(f, n_params, vocab_tokens=vocabulary, sequence_tokens=length) for f in FAMILIES]
        trainings = {shape.family: Training(shape, dtype, N_ROWS, device) for shape in shapes}
        for training in trainings.values():
            training()
            training()
        times = interleaved(trainings, device, repeats)
        for family, training in trainings.items():
            median = statistics.median(times[family])
            speed = N_ROWS * length / median
            row: Row = {"family": family, "n_params": n_params, "vocab_tokens": vocabulary, "dtype": name}
            row |= {"step_seconds": median, "tokens_per_second": speed}
            row["speed_against_transformer"] = ratio(times["transformer"], times[family])
            row["share_of_matmul_peak"] = speed * flops(training.shape).training / peaks[name]
            rows.append(row | shares(training, median, device, min(repeats, 3)))
    tops: list[Row] = [{"dtype": name, "matmul_flops_per_second": peak} for name, peak in peaks.items()]
    return Section({"step": rows, "matmul": tops}, dtype_notes(device))


def head(device: torch.device, quick: bool) -> Section:
    """Section `head`: forward and backward of the loss from hidden states, 8 x 1,024 tokens, d = 204, V = 50,257."""
    n_tokens, width, vocabulary = (1024, 24, 16_384) if quick else (8 * 1024, 204, 50_257)
    if available_bytes(device) < 24 * n_tokens * vocabulary:
        return Section({}, ["too little memory for all logits"])
    losses = {"plain": plain_loss} | ({"blocked": linear_cross_entropy} if linear_cross_entropy else {})
    runs, peaks = dict[tuple[str, str], Run](), dict[tuple[str, str], float | None]()
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(vocabulary, (n_tokens,), generator=rng).to(device)
    for (kind, loss), (name, dtype) in itertools.product(losses.items(), dtypes(device).items()):
        x = torch.randn(n_tokens, width, generator=rng).to(device, dtype).requires_grad_()
        weight = nn.Parameter((torch.randn(vocabulary, width, generator=rng) * width**-0.5).to(device, dtype))

        def run(loss: Callable[..., Tensor] = loss, x: Tensor = x, weight: Tensor = weight) -> None:
            x.grad = weight.grad = None
            (loss(x, weight, targets).sum() / n_tokens).backward()

        run()
        x.grad = weight.grad = None
        runs[kind, name], peaks[kind, name] = run, peak_bytes(run, device)
    times = interleaved(runs, device, 2 if quick else 3)
    rows = list[Row]()
    for (kind, name), spent in times.items():
        peak, plain = peaks[kind, name], peaks["plain", name]
        row: Row = {"head": kind, "dtype": name, "seconds": statistics.median(spent), "peak_bytes": peak}
        row["time_against_plain"] = ratio(spent, times["plain", name])
        row["memory_against_plain"] = peak / plain if peak is not None and plain else None
        rows.append(row)
    missing = [] if linear_cross_entropy else ["blocked head: not in this revision"]
    return Section({"head": rows}, missing + dtype_notes(device))


def loader(device: torch.device, quick: bool) -> Section:
    """Section `loader`: time to read a batch of N_ROWS rows, against the fastest step, that of the smallest models."""
    vocabulary, length, n_tokens = (512, 128, 2**20) if quick else (VOCABULARIES[-1], LENGTH, 2**25)
    shapes = [shape_for(f, SIZES[0], vocab_tokens=vocabulary, sequence_tokens=length) for f in FAMILIES]
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(vocabulary, size=n_tokens, dtype=np.uint16).tofile(stream)
        rows = TokenDataset(stream, "<u2", length)
        step_numbers = itertools.count()

        def batches() -> None:
            for step in itertools.islice(step_numbers, 100):
                rows.batch(row_indices(len(rows), 0, step, N_ROWS))

        runs: dict[str, Run] = {"loader": batches}
        runs |= {shape.family: Training(shape, torch.float32, N_ROWS, device) for shape in shapes}
        for run in runs.values():
            run()
        times = interleaved(runs, device, 3 if quick else 9)
    batch_seconds = statistics.median(times.pop("loader")) / 100
    family, fastest = min(((f, statistics.median(t)) for f, t in times.items()), key=lambda pair: pair[1])
    row: Row = {"batch_tokens": N_ROWS * length, "batches_per_second": 1 / batch_seconds, "fastest_step_seconds": fastest}
    return Section({"loader": [row | {"share_of_step": batch_seconds / fastest}]}, [f"the fastest step is that of {family}"])
