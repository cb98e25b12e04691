"""Speed of `prepare` against the bare tokenizer on the same cores: `python benchmarks/prepare.py [CONFIG] [key=value ...]`.

Prints one JSON object, from interleaved repeats: seconds of `encode_batch` over all documents with all threads of the
tokenizer; seconds of preparing with an existing tokenizer (including reading, JSON, hashing, packing, writing and process
starts); their ratio; the peak memory of each; and the longest time without a sign of progress.

`python benchmarks/prepare.py --one-file [BYTES]` does so for one large .jsonl and one large .txt (200 MB), kills the
preparation at half with SIGKILL, and says which share of the work is lost.
"""

import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lmu_dist.config import Config, DataConfig, TokenizerConfig, load
from lmu_dist.data.prepare import prepare
from lmu_dist.data.sources import Document, read
from lmu_dist.data.tokenizer import load as load_tokenizer
from lmu_dist.data.tokenizer import make as make_tokenizer

try:
    from lmu_dist.data.sources import list_shards
except ImportError:  # speed.py --base with a revision before it got this name
    from lmu_dist.data.sources import list_units as list_shards  # pyright: ignore[reportAttributeAccessIssue]

REPEATS = 3
BATCH_BYTES = 8_000_000  # text per call of bare `encode_batch`; the encodings of all documents at once need gigabytes
ONE_FILE_BYTES = 200_000_000


def bare(data: DataConfig, tokenizer: Path) -> tuple[float, int, int]:
    """Seconds, bytes of text and peak memory of `encode_batch` of all documents. Reading them is not timed."""
    encoder = load_tokenizer(tokenizer)
    seconds, n_bytes = 0.0, 0
    texts: list[str] = []

    def encode() -> None:
        nonlocal seconds
        began = time.perf_counter()
        encoder.encode_batch(texts)
        seconds += time.perf_counter() - began
        texts.clear()

    size = 0
    for shard in list_shards(data):
        for item in read(shard, data):
            if isinstance(item, Document):
                texts.append(item.text)
                n_bytes += len(item.text.encode())
                size += len(item.text)
                if size >= BATCH_BYTES:
                    encode()
                    size = 0
    encode()
    return seconds, n_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(data: DataConfig, folder: Path) -> tuple[float, int, float]:
    """Seconds of `prepare`, the peak memory of its largest process, and the longest time between two calls of progress."""
    times = [time.perf_counter()]
    prepare(data, folder, lambda *_: times.append(time.perf_counter()))
    seconds = time.perf_counter() - times[0]
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return seconds, max(usage) * 1024, max(after - before for before, after in itertools.pairwise(times))


def lost_share(data: DataConfig, folder: Path) -> float:
    """The share of the work that is lost if the preparation is killed at half."""
    began = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=_prepare_and_report, args=(data, folder, began))
    process.start()
    while (done := began.get()) < 0.51:  # not at the end of a part
        pass
    process.kill()
    process.join()
    kept = []

    def note(activity: str, part: float, total: float, *_: object) -> None:
        if activity == "tokenizing":
            kept.append(part / total)
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        prepare(data, folder, note)
    return 1 - kept[0] / done


def _prepare_and_report(data: DataConfig, folder: Path, to: "multiprocessing.Queue[float]") -> None:
    prepare(data, folder, lambda activity, done, total, *_: to.put(done / total if activity == "tokenizing" else 0.0))


def one_file(n_bytes: int) -> dict[str, dict[str, int | float]]:
    """Measures a corpus of one .jsonl and one of one .txt, made of the sources of Python's standard library."""
    stdlib = DataConfig()
    texts = [item.text for shard in list_shards(stdlib) for item in read(shard, stdlib) if isinstance(item, Document)]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        first = list(itertools.islice(texts, 500))
        tokenizer, _ = make_tokenizer(TokenizerConfig(), lambda: iter(first))
        tokenizer.save(f"{scratch}/tokenizer.json")
        for suffix in ("jsonl", "txt"):
            path = Path(scratch) / f"corpus.{suffix}"
            with open(path, "w", encoding="utf-8") as file:
                for number, text in enumerate(itertools.cycle(texts)):
                    file.write(json.dumps({"text": f"{number} {text}"}) + "\n" if suffix == "jsonl" else text)
                    if file.tell() > n_bytes:
                        break
            given = TokenizerConfig(kind="file", path=f"{scratch}/tokenizer.json")
            data = DataConfig(source="files", files=(str(path),), tokenizer=given)
            found[suffix] = _compare(data, Path(scratch) / "tokenizer.json", Path(scratch) / suffix, 1)
            found[suffix]["lost_share_after_kill_at_half"] = lost_share(data, Path(scratch) / f"{suffix}-killed")
            print(suffix, json.dumps(found[suffix]), file=sys.stderr, flush=True)
            path.unlink()
    return found


def measure(data: DataConfig, repeats: int = REPEATS) -> dict[str, int | float]:
    """Measures both and returns the JSON object."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(str(prepare(data, Path(scratch)).folder / "tokenizer.json"))
        given = replace(data, tokenizer=TokenizerConfig(kind="file", path=str(tokenizer)))
        return _compare(given, tokenizer, Path(scratch), repeats)


def _compare(data: DataConfig, tokenizer: Path, scratch: Path, repeats: int) -> dict[str, int | float]:
    bare_runs, our_runs = [], []
    for i in range(repeats):
        # Separate processes, because the peak memory of a process never falls.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            bare_runs.append(pool.submit(bare, data, tokenizer).result())
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            our_runs.append(pool.submit(ours, data, scratch / str(i)).result())
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
        "prepare_seconds_without_progress": max(run[2] for run in our_runs),
    }


def main() -> None:
    """Prints the JSON object."""
    if sys.argv[1:2] == ["--one-file"]:
        print(json.dumps(one_file(int(sys.argv[2]) if len(sys.argv) > 2 else ONE_FILE_BYTES), indent=1))
        return
    data = (load(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else Config()).data
    print(json.dumps(measure(data), indent=1))


if __name__ == "__main__":
    main()
