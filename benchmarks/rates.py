"""What a learning rate that depends on the budget buys: loss differences to one shared rate, at four budgets, as a table.

    python benchmarks/rates.py lmu transformer --n-params 3000 --rates 0.01 0.03 --seeds 0 1 2

For every family, peak rate and seed it trains two trunks with the schedule `wsd`. In one all budgets have the same rate. In the
other the rate is stepped: `--token-exponent` of the budget's multiple, from one branch point to the next, as the rule
`ladder.learning_rate` does it. Both have the same weights, rows and evaluation, so that the difference of a pair has little
noise. It is negative where the stepped rate is better. Intervals are 90 %, Student's t over the seeds. The last lines compare
each schedule at the peak rate that is best for it at the largest budget. It trains in this process, in plain torch, on Python's
standard library.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from lmu_dist.config import TrainConfig, parse
from lmu_dist.data.batches import TokenDataset, row_indices
from lmu_dist.data.corpus import open_corpus
from lmu_dist.data.prepare import prepare
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.sizing import shape_for
from lmu_dist.train.evaluate import evaluated_rows
from lmu_dist.train.schedule import learning_rate

MULTIPLES = (1, 2, 4, 8)
EVALUATED_TOKENS = 32_768


def trunk(train: TrainConfig, budgets: Sequence[int]) -> list[TrainConfig]:
    """The runs of a trunk, smallest budget first; each has the smaller budgets before it if the rate depends on them."""
    is_stepped = bool(train.rate_token_exponent)
    return [replace(train, tokens=d, earlier_tokens=tuple(budgets[:i]) if is_stepped else ()) for i, d in enumerate(budgets)]


def losses_of(
    runs: Sequence[TrainConfig], model: LanguageModel, rows: TokenDataset, held_out: TokenDataset, seed: int
) -> Iterator[float]:
    """Trains the runs of a trunk, each from the branch point of the one before it. Yields the validation loss of each."""
    first = runs[0]
    adam = torch.optim.Adam(model.parameters(), betas=(first.beta1, first.beta2), eps=first.eps)

    def advance(model: LanguageModel, adam: torch.optim.Optimizer, train: TrainConfig, steps: range) -> None:
        for step in steps:
            batch = rows.batch(row_indices(len(rows), seed, step, train.batch_rows))
            for group in adam.param_groups:
                group["lr"] = learning_rate(train, step)
            losses = model(batch.inputs, batch.targets)
            adam.zero_grad()
            (losses.sum() / losses.numel()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
            adam.step()

    done = 0
    for train in runs:
        advance(model, adam, train, range(done, train.decay_start))
        done = train.decay_start
        branch, of_branch = copy.deepcopy((model, adam))  # together, so that the copy of Adam has the copied parameters
        advance(branch, of_branch, train, range(done, train.n_steps))
        with torch.no_grad():
            batch = held_out.batch(evaluated_rows(held_out, EVALUATED_TOKENS))
            yield float(branch(batch.inputs, batch.targets).double().mean())


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 90 % interval."""
    spread = np.std(differences, ddof=1) / np.sqrt(len(differences))
    return float(np.mean(differences)), float(stats.t.ppf(0.95, len(differences) - 1) * spread)


def compare(found: dict[tuple[str, float, bool], list[list[float]]], families: Sequence[str], rates: Sequence[float]) -> None:
    """Prints the differences, stepped minus shared, of each family and peak rate, and of the best peak rates."""
    print("family       peak rate        shared rate, nats                    stepped - shared, nats (90 %)")

    def row(name: str, label: str, shared: Sequence[list[float]], stepped: Sequence[list[float]]) -> None:
        means = " ".join(f"{value:.4f}" for value in np.mean(shared, axis=0))
        pairs = zip(zip(*stepped, strict=True), zip(*shared, strict=True), strict=True)
        ends = [interval([a - b for a, b in zip(of_stepped, of_shared, strict=True)]) for of_stepped, of_shared in pairs]
        print(f"{name:12} {label:16} {means:36} {'  '.join(f'{mean:+.4f} +- {half:.4f}' for mean, half in ends)}")

    for family in families:
        for rate in rates:
            row(family, f"{rate:g}", found[family, rate, False], found[family, rate, True])
        best = {
            stepped: min(rates, key=lambda r, s=stepped, f=family: np.mean([losses[-1] for losses in found[f, r, s]]))
            for stepped in (False, True)
        }
        label = f"best: {best[False]:g}, {best[True]:g}"
        row(family, label, found[family, best[False], False], found[family, best[True], True])


def main() -> None:
    """Trains all pairs of trunks, writes a JSON line for each to stderr, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+")
    parser.add_argument("--n-params", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=100_000, help="smallest budget; the others are 2, 4 and 8 times it")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03], help="peak rates of the smallest budget")
    parser.add_argument("--token-exponent", type=float, default=-0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sequence-tokens", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--vocab-tokens", type=int, default=512)
    parser.add_argument("--corpus", type=Path, help="folder of a prepared corpus; default: it is prepared in a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    budgets = [args.tokens * multiple for multiple in MULTIPLES]
    shared = TrainConfig(
        tokens=args.tokens,
        sequence_tokens=args.sequence_tokens,
        batch_tokens=args.batch_tokens,
        warmup_tokens=args.tokens // 10,
        schedule="wsd",
    )
    stepped = replace(shared, rate_token_exponent=args.token_exponent, rate_at_tokens=args.tokens)
    found: dict[tuple[str, float, bool], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = parse({"data": {"tokenizer": {"vocab_tokens": args.vocab_tokens}}}).data
        corpus = open_corpus(args.corpus) if args.corpus else prepare(data, Path(scratch))
        rows, held_out = (corpus.rows(split, args.sequence_tokens) for split in ("train", "validation"))
        vocab = corpus.manifest.vocab_tokens
        for seed in args.seeds:
            for family in args.families:
                shape = shape_for(family, args.n_params, vocab_tokens=vocab, sequence_tokens=args.sequence_tokens)
                for rate in args.rates:
                    for is_stepped, train in ((False, shared), (True, stepped)):
                        runs, began = trunk(replace(train, learning_rate=rate), budgets), time.process_time()
                        losses = list(losses_of(runs, LanguageModel(shape, seed), rows, held_out, seed))
                        found.setdefault((family, rate, is_stepped), []).append(losses)
                        facts: dict[str, Any] = {"family": family, "rate": rate, "stepped": is_stepped, "seed": seed}
                        facts |= {"losses_nats": losses, "cpu_seconds": round(time.process_time() - began, 1)}
                        print(json.dumps(facts), file=sys.stderr, flush=True)
    compare(found, args.families, args.rates)


if __name__ == "__main__":
    main()
