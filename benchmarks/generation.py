"""Section `generation` of speed.py: time and memory per generated token by context length.

Table `contexts`: every family after contexts of 100 .. 100,000 tokens; the timed blocks of tokens are interleaved over all of
them. Table `long`: `generate` with a small LMU for 100,000 tokens; speed and process memory in the first and the last thousand.
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

from lmu_dist.models import generate, registry
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.sizing import shape_for

FAMILIES = ("lmu", "lmu_attention", "transformer")
CONTEXTS, QUICK_CONTEXTS = (100, 1_000, 10_000, 100_000), (100, 300)
N_PARAMS, VOCAB, LENGTH = 100_000, 4_096, 1_024
PREFILL_TOKENS = 256  # tokens per prefill call; attention's mask has this many rows, each as long as the context
PREFILL_SECONDS = 90.0  # limit for prefilling all contexts of a family
BLOCK_TOKENS = 16  # tokens per timed call


class Decoder:
    """A model with the state after a context. A call generates the next BLOCK_TOKENS tokens, one by one."""

    def __init__(self, model: LanguageModel, state: Any, device: torch.device) -> None:
        self.model, self.state = model, state
        self.token = torch.ones(1, 1, dtype=torch.long, device=device)

    def __call__(self) -> None:
        """Generates BLOCK_TOKENS tokens by greedy decoding."""
        for _ in range(BLOCK_TOKENS):
            self.step()

    def step(self) -> None:
        """Generates one token."""
        logits, self.state = self.model.advance(self.token, self.state)
        self.token = logits[:, -1:].argmax(2)

    def state_bytes(self) -> float:
        """Bytes of the state that is kept between tokens, including memory allocated in advance."""
        return float(sum(t.untyped_storage().nbytes() for t in _tensors(self.state)))


def _tensors(state: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(state):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from _tensors(list(vars(leaf).values()))


def decoders(
    family: str, contexts: tuple[int, ...], device: torch.device, n_params: int
) -> tuple[dict[tuple[str, int], Decoder], list[str]]:
    """A Decoder for each context length: one model prefills the longest context, and its state is copied at each length."""
    shape = shape_for(family, n_params, vocab_tokens=VOCAB, sequence_tokens=LENGTH)
    if registry.family_of(shape).learned_positions:  # needs an embedding for each position
        shape = replace(shape, sequence_tokens=2 * contexts[-1])
    model = LanguageModel(shape).to(device).eval()
    tokens = torch.randint(VOCAB, (1, contexts[-1]), generator=torch.Generator().manual_seed(0)).to(device)
    found, state, at, began = dict[tuple[str, int], Decoder](), None, 0, time.monotonic()
    for context in contexts:
        for piece in tokens[:, at:context].split(PREFILL_TOKENS, 1):
            _, state = model.advance(piece, state)
            if time.monotonic() - began > PREFILL_SECONDS:
                return found, [f"{family}: no context of {context:,} or more, prefill takes over {PREFILL_SECONDS:.0f} s"]
        at = context
        found[family, context] = Decoder(model, copy.deepcopy(state), device)
    return found, []


def by_context(contexts: tuple[int, ...], device: torch.device, quick: bool) -> tuple[list[Row], list[str]]:
    """Rows of table `contexts`: seconds per token, bytes of the state, and peak bytes of a token in addition to it."""
    all_decoders, notes = dict[tuple[str, int], Decoder](), list[str]()
    for family in FAMILIES:
        found, new_notes = decoders(family, contexts, device, 10_000 if quick else N_PARAMS)
        all_decoders |= found
        notes += new_notes
    for decoder in all_decoders.values():
        decoder()  # warm-up
    times = interleaved(all_decoders, device, 3 if quick else 15)
    rows = list[Row]()
    for family, context in itertools.product(FAMILIES, contexts):
        row: Row = {"family": family, "context": context}
        row |= dict.fromkeys(("seconds_per_token", "against_shortest", "state_bytes", "peak_bytes"))
        if decoder := all_decoders.get((family, context)):
            block_seconds = statistics.median(times[family, context])
            row["seconds_per_token"] = block_seconds / BLOCK_TOKENS
            row["against_shortest"] = block_seconds / statistics.median(times[family, contexts[0]])
            row["state_bytes"], row["peak_bytes"] = decoder.state_bytes(), peak_bytes(decoder.step, device)
        rows.append(row)
    return rows, notes


def long(n_tokens: int, window: int) -> list[Row]:
    """Rows of table `long`: speed and memory of `generate` over its first and its last `window` tokens."""
    model = LanguageModel(shape_for("lmu", 10_000, vocab_tokens=VOCAB, sequence_tokens=LENGTH))
    tokens = generate.generate(model, [[1]], generate.Sampling(seed=0))
    next(tokens)  # the first token includes one-time setup
    rows, generated = list[Row](), 1
    for name, first in (("first", 1), ("last", n_tokens - window)):
        for _ in itertools.islice(tokens, first - generated):
            pass
        began = time.perf_counter()
        for _ in itertools.islice(tokens, window):
            pass
        speed, generated = window / (time.perf_counter() - began), first + window
        trim()
        rows.append({"tokens": f"{name} {window:,} of {n_tokens:,}", "tokens_per_second": speed, "rss_bytes": _rss()})
    return rows


def _rss() -> float | None:
    return status_bytes("VmRSS") if STATUS.exists() else None


@torch.no_grad()
def measure(device: torch.device, quick: bool) -> Section:
    """Runs the section."""
    rows, notes = by_context(QUICK_CONTEXTS if quick else CONTEXTS, device, quick)
    tables = {"contexts": rows}
    generate_function: Callable[..., Any] = generate.generate
    if device.type != "cpu":
        notes.append("long: `generate` runs on the CPU")
    elif "sampling" not in inspect.signature(generate_function).parameters:
        notes.append("long: this revision's `generate` has another signature")
    else:
        tables["long"] = long(*((400, 100) if quick else (100_000, 1_000)))
    return Section(tables, notes)
