"""What the orders q and q' of the LMU buy at a fixed size N: the validation loss of one run per pair, as JSON lines.

    python benchmarks/orders.py --n-params 250000 --tokens 2000000 12:125 12:64 6:64 --seeds 0 1

Each argument is q':q. The feed-forward width takes up what the mixer leaves of N, so all runs have the same number of
parameters. Every pair has the same data, batches and learning rate. It trains in this process, on Python's standard library.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}  # DeepSpeed reads both

import torch
import torch.distributed as dist

from lmu_dist.config import DataConfig, TrainConfig, parse
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import prepare
from lmu_dist.models.accounting import flops, parameters
from lmu_dist.models.families.lmu import LMUOptions
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.sizing import shape_for
from lmu_dist.train.engine import Engine
from lmu_dist.train.evaluate import evaluate, evaluated_rows
from lmu_dist.train.loop import train_rows

EVALUATED_ROWS = 256


def run(corpus: Corpus, train: TrainConfig, n_params: int, pair: str, seed: int) -> dict[str, Any]:
    """Trains one LMU with the reduced order and order of `pair`, q':q. Returns its widths, FLOPs and losses."""
    reduced_order, order = map(int, pair.split(":"))
    options = LMUOptions(order=order, reduced_order=reduced_order)
    manifest = corpus.manifest
    shape = shape_for(
        "lmu", n_params, vocab_tokens=manifest.vocab_tokens, sequence_tokens=train.sequence_tokens, options=options
    )
    cluster = parse({"cluster": {"n_workers": 1, "zero_stage": 0}}).cluster
    engine = Engine(LanguageModel(shape, seed, options), train, cluster, torch.device("cpu"))
    rows, held_out = corpus.rows("train", train.sequence_tokens), corpus.rows("validation", train.sequence_tokens)
    began = time.perf_counter()
    losses = [metrics.loss_nats for metrics in train_rows(engine, rows, train, seed, 0, lambda: ())]
    seconds = time.perf_counter() - began
    found = evaluate(
        engine,
        held_out,
        evaluated_rows(held_out, EVALUATED_ROWS * train.sequence_tokens),
        0,
        1,
        train.n_steps,
        manifest.bytes_per_token("validation"),
    )
    engine.close()
    return {
        "reduced_order": reduced_order,
        "order": order,
        "d_model": shape.d_model,
        "d_ff": shape.d_ff,
        "n_params": parameters(shape).non_embedding,
        "seed": seed,
        "tokens": train.tokens,
        "learning_rate": train.learning_rate,
        "counted_flops_per_token": flops(shape).training,
        "seconds": seconds,
        "train_loss_nats": sum(losses[-50:]) / len(losses[-50:]),
        "val_loss_nats": found.loss_nats,
        "val_standard_error_nats": found.standard_error_nats,
    }


def main() -> None:
    """Trains all pairs and seeds, and prints a JSON object for each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="q':q")
    parser.add_argument("--n-params", type=int, default=250_000)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--sequence-tokens", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--storage", type=Path, help="folder of the prepared corpus; default: a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train = TrainConfig(
        tokens=args.tokens,
        sequence_tokens=args.sequence_tokens,
        batch_tokens=args.batch_tokens,
        learning_rate=args.learning_rate,
        warmup_tokens=args.tokens // 20,
    )
    with tempfile.TemporaryDirectory() as scratch:
        corpus = prepare(DataConfig(), args.storage or Path(scratch))
        for seed in args.seeds:
            for pair in args.pairs:
                print(json.dumps(run(corpus, train, args.n_params, pair, seed)), flush=True)


if __name__ == "__main__":
    main()
