"""Speed of `prepare` against the bare tokenizer on the same cores: `python benchmarks/prepare.py [CONFIG] [key=value ...]`.

Prints one JSON object, from interleaved repeats: seconds of one `encode_batch` over all documents with all threads of the
tokenizer; seconds of preparing with an existing tokenizer (including reading, JSON, hashing, packing, writing and process
starts); their ratio; and the peak memory of each.
"""

import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from lmu_dist.config import Config, DataConfig, TokenizerConfig, load
from lmu_dist.data.prepare import prepare
from lmu_dist.data.sources import Document, read
from lmu_dist.data.tokenizer import load as load_tokenizer

try:
    from lmu_dist.data.sources import list_shards
except ImportError:  # speed.py --base with a revision before it got this name
    from lmu_dist.data.sources import list_units as list_shards  # pyright: ignore[reportAttributeAccessIssue]

REPEATS = 3


def bare(data: DataConfig, tokenizer: Path) -> tuple[float, int, int]:
    """Seconds, bytes of text and peak memory of one `encode_batch` of all documents. Reading them is not timed."""
    texts = [item.text for shard in list_shards(data) for item in read(shard, data) if isinstance(item, Document)]
    encoder = load_tokenizer(tokenizer)
    began = time.perf_counter()
    encoder.encode_batch(texts)
    seconds = time.perf_counter() - began
    return seconds, sum(len(t.encode()) for t in texts), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(data: DataConfig, folder: Path) -> tuple[float, int]:
    """Seconds of `prepare`, and the peak memory of its largest process."""
    began = time.perf_counter()
    prepare(data, folder)
    seconds = time.perf_counter() - began
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return seconds, max(usage) * 1024


def measure(data: DataConfig, repeats: int = REPEATS) -> dict[str, int | float]:
    """Measures both and returns the JSON object."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(str(prepare(data, Path(scratch)).folder / "tokenizer.json"))
        given = replace(data, tokenizer=TokenizerConfig(kind="file", path=str(tokenizer)))
        bare_runs, our_runs = [], []
        for i in range(repeats):
            # Separate processes, because the peak memory of a process never falls.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                bare_runs.append(pool.submit(bare, given, tokenizer).result())
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                our_runs.append(pool.submit(ours, given, Path(scratch) / str(i)).result())
    text_bytes = bare_runs[0][1]
    bare_seconds, our_seconds = (statistics.median(run[0] for run in runs) for runs in (bare_runs, our_runs))
    return {
        "text_bytes": text_bytes,
        "cpus": len(os.sched_getaffinity(0)),
        "bare_encode_batch_seconds": bare_seconds,
        "prepare_seconds": our_seconds,
        "prepare_bytes_per_second": text_bytes / our_seconds,
        "speed_against_bare": statistics.median(b[0] / o[0] for b, o in zip(bare_runs, our_runs, strict=True)),
        "bare_peak_bytes": max(run[2] for run in bare_runs),
        "prepare_peak_bytes": max(run[1] for run in our_runs),
    }


def main() -> None:
    """Prints the JSON object."""
    data = (load(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else Config()).data
    print(json.dumps(measure(data), indent=1))


if __name__ == "__main__":
    main()
