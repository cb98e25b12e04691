"""Section `generation` of speed.py: time and memory per token against the length of the text before it.

Tables: `contexts` (every family from states after 100 .. 100,000 tokens, blocks of tokens interleaved over all of them),
`long` (`generate` writing 100,000 tokens with a small LMU: speed and memory of the process in its first and last thousand).
Called by section.py.
"""

import copy
import inspect
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from measure import STATUS, Row, Section, interleaved, peak_bytes, status_bytes, trim
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lmu_dist.models import generate
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.sizing import shape_for

FAMILIES = ("lmu", "lmu_attention", "transformer")
CONTEXTS, QUICK_CONTEXTS = (100, 1_000, 10_000, 100_000), (100, 300)
N_PARAMS, VOCAB, LENGTH = 100_000, 4_096, 1_024
PREFILL_TOKENS = 256  # read at once: attention's mask is this times the context
PREFILL_SECONDS = 90.0  # for a family to read all contexts
BLOCK_TOKENS = 16  # timed at once


class Writer:
    """A model behind a context: a call is the next BLOCK_TOKENS tokens, one by one."""

    def __init__(self, model: LanguageModel, state: Any, device: torch.device) -> None:
        self.model, self.state = model, state
        self.token = torch.ones(1, 1, dtype=torch.long, device=device)

    def __call__(self) -> None:
        """BLOCK_TOKENS tokens, each the best after the one before."""
        for _ in range(BLOCK_TOKENS):
            self.one()

    def one(self) -> None:
        """One token."""
        logits, self.state = self.model.advance(self.token, self.state)
        self.token = logits[:, -1:].argmax(2)

    def state_bytes(self) -> float:
        """All that is carried from token to token, room kept for more included."""
        return float(sum(t.untyped_storage().nbytes() for t in _tensors(self.state)))


def _tensors(state: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(state):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from _tensors(list(vars(leaf).values()))


def writers(
    family: str, contexts: tuple[int, ...], device: torch.device, n_params: int
) -> tuple[dict[tuple[str, int], Writer], list[str]]:
    """A Writer behind each context: one model that reads on, its state copied on the way."""
    shape = shape_for(family, n_params, vocab_tokens=VOCAB, sequence_tokens=LENGTH)
    if shape.learned_positions:  # one for every place it can come to
        shape = replace(shape, sequence_tokens=2 * contexts[-1])
    model = LanguageModel(shape).to(device).eval()
    tokens = torch.randint(VOCAB, (1, contexts[-1]), generator=torch.Generator().manual_seed(0)).to(device)
    found, state, at, began = dict[tuple[str, int], Writer](), None, 0, time.monotonic()
    for context in contexts:
        for piece in tokens[:, at:context].split(PREFILL_TOKENS, 1):
            _, state = model.advance(piece, state)
            if time.monotonic() - began > PREFILL_SECONDS:
                return found, [f"{family} from a context of {context:,} on: reading it takes more than {PREFILL_SECONDS:.0f} s"]
        at = context
        found[family, context] = Writer(model, copy.deepcopy(state), device)
    return found, []


def by_context(contexts: tuple[int, ...], device: torch.device, quick: bool) -> tuple[list[Row], list[str]]:
    """Seconds of a token, bytes of the state and bytes that a token needs beside it."""
    every, notes = dict[tuple[str, int], Writer](), list[str]()
    for family in FAMILIES:
        found, said = writers(family, contexts, device, 10_000 if quick else N_PARAMS)
        every |= found
        notes += said
    for writer in every.values():
        writer()
    times = interleaved(every, device, 3 if quick else 15)
    rows = list[Row]()
    for family, context in itertools.product(FAMILIES, contexts):
        row: Row = {"family": family, "context": context}
        row |= dict.fromkeys(("seconds_per_token", "against_shortest", "state_bytes", "peak_bytes"))
        if writer := every.get((family, context)):
            mine = statistics.median(times[family, context])
            row["seconds_per_token"] = mine / BLOCK_TOKENS
            row["against_shortest"] = mine / statistics.median(times[family, contexts[0]])
            row["state_bytes"], row["peak_bytes"] = writer.state_bytes(), peak_bytes(writer.one, device)
        rows.append(row)
    return rows, notes


def long(n_tokens: int, window: int) -> list[Row]:
    """What `generate` takes over its first and its last `window` tokens."""
    model = LanguageModel(shape_for("lmu", 10_000, vocab_tokens=VOCAB, sequence_tokens=LENGTH))
    tokens = generate.generate(model, [[1]], generate.Sampling(seed=0))
    next(tokens)  # what is made once
    rows, written = list[Row](), 1
    for name, first in (("first", 1), ("last", n_tokens - window)):
        for _ in itertools.islice(tokens, first - written):
            pass
        began = time.perf_counter()
        for _ in itertools.islice(tokens, window):
            pass
        speed, written = window / (time.perf_counter() - began), first + window
        trim()
        rows.append({"tokens": f"{name} {window:,} of {n_tokens:,}", "tokens_per_second": speed, "rss_bytes": _rss()})
    return rows


def _rss() -> float | None:
    return status_bytes("VmRSS") if STATUS.exists() else None


@torch.no_grad()
def measure(device: torch.device, quick: bool) -> Section:
    """The section."""
    rows, notes = by_context(QUICK_CONTEXTS if quick else CONTEXTS, device, quick)
    tables = {"contexts": rows}
    made: Callable[..., Any] = generate.generate
    if device.type != "cpu":
        notes.append("long: `generate` runs on the CPU")
    elif "sampling" not in inspect.signature(made).parameters:
        notes.append("long: this revision's `generate` is another")
    else:
        tables["long"] = long(*((400, 100) if quick else (100_000, 1_000)))
    return Section(tables, notes)
