"""`lmu-dist`: parses, calls one function, prints. Run `lmu-dist --help`.

Exit codes: 0 done, 1 failed, 2 bad input (one line that names the fix; nothing was started).
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lmu_dist import __version__
from lmu_dist.config import Config, ConfigError, load

console = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.command(parsed)
    except ConfigError as e:
        console.print(f"lmu-dist: {e}", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("lmu-dist: interrupted; the same command goes on from the last checkpoint")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lmu-dist", description="Train LMU language models on Ray and DeepSpeed, recorded by MLflow."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(command=function)
        return command

    for name, function, summary in (
        ("prepare", prepare, "text to packed token rows; resumable; skips what is done"),
        ("train", train, "one run on the cluster (or a local one started for it); resumable; skips what is done"),
    ):
        command = add(name, function, summary)
        command.add_argument("config", help="a YAML file, such as jobs/train.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.learning_rate=1e-3")
        command.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    command = add("generate", generate, "text from a trained model")
    command.add_argument("run", help="folder of a run or of an export, or an MLflow run id")
    command.add_argument("--prompt", default="import ", help="text to go on from (default: %(default)r)")
    command.add_argument("--tokens", type=int, default=100, help="tokens to add (default: %(default)s)")
    command.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    command.add_argument(
        "--top-k", type=int, default=50, help="sample from so many likeliest tokens; 0: all (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    command = add("export", export, "safetensors + config + tokenizer, reloaded and compared")
    command.add_argument("run", help="folder of a run, or an MLflow run id")
    command.add_argument("folder", type=Path, help="new folder to write")
    return parser


def prepare(parsed: argparse.Namespace) -> int:
    """`lmu-dist prepare CONFIG`"""
    from lmu_dist.data.prepare import prepare as prepare_corpus

    config = load(parsed.config, parsed.overrides)
    with _bars() as bars:
        corpus = prepare_corpus(config.data, Path(config.storage).expanduser().absolute(), bars.show)
    manifest = corpus.manifest
    if parsed.json:
        print(json.dumps({"folder": str(corpus.folder), **asdict(manifest)}))
        return 0
    for split, facts in manifest.splits.items():
        print(f"{split:<12}{facts['tokens']:>14,} tokens {facts['bytes']:>16,} bytes {facts['documents']:>10,} documents")
    listed = f", listed in {corpus.folder / 'problems.jsonl'}" if manifest.problems else ""
    print(f"left out    {', '.join(f'{n} {kind}' for kind, n in manifest.problems.items()) or 'nothing'}{listed}")
    print(f"folder      {corpus.folder}\nnext        lmu-dist train {parsed.config}")
    return 0


def train(parsed: argparse.Namespace) -> int:
    """`lmu-dist train CONFIG`"""
    config = load(parsed.config, parsed.overrides)
    from lmu_dist.launch.trainer import RunFailedError
    from lmu_dist.launch.trainer import train as train_run

    try:
        with _bars() as bars:
            finished = train_run(config, _tracking_uri(), bars.show, lambda latest: bars.show_training(config, latest))
    except RunFailedError as e:
        console.print(f"lmu-dist: training failed: {e}; the same command goes on from the last checkpoint", markup=False)
        return 1
    record, uri = finished.record, finished.tracking_uri
    for note in (
        *finished.notes,
        f"MLflow has not all of the record yet: {finished.undelivered}" if finished.undelivered else "",
    ):
        if note:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
    if parsed.json:
        print(
            json.dumps({"run_id": finished.run_id, "folder": str(finished.cell.folder), "tracking_uri": uri, **asdict(record)})
        )
    else:
        print(
            f"{'was done' if finished.already_done else record.status:<12}{finished.cell.name}\n"
            f"model       {record.family}, N = {record.n_params:,}, with head {record.n_params_with_head:,}\n"
            f"tokens      {record.tokens:,} in {record.steps:,} steps, {record.training_seconds:.0f} s of training\n"
            f"validation  {record.val_loss_nats:.4f} +- {record.val_loss_standard_error_nats:.4f} nats per token, "
            f"{record.val_bits_per_byte:.4f} bits per byte\n"
            f"MLflow      run {finished.run_id} in {uri}\n"
            f"folder      {finished.cell.folder}\n"
            f"next        lmu-dist generate {finished.cell.folder} --prompt 'import '"
        )
    return 0 if record.status == "complete" else 1


def generate(parsed: argparse.Namespace) -> int:
    """`lmu-dist generate RUN --prompt TEXT`"""
    from lmu_dist.data.tokenizer import end_of_text_id
    from lmu_dist.models.generate import generate as sample
    from lmu_dist.train.export import open_trained

    trained = open_trained(_run_folder(parsed.run))
    prompt = trained.tokenizer.encode(parsed.prompt).ids or [end_of_text_id(trained.tokenizer)]
    shown, ids = "", list(prompt)
    try:
        for token in islice(sample(trained.model, prompt, parsed.temperature, parsed.top_k, parsed.seed), parsed.tokens):
            ids.append(token)
            text = trained.tokenizer.decode(ids, skip_special_tokens=False)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except ValueError as e:
        raise ConfigError(str(e)) from e
    print()
    return 0


def export(parsed: argparse.Namespace) -> int:
    """`lmu-dist export RUN DIR`"""
    from lmu_dist.train.export import export as write

    write(_run_folder(parsed.run), parsed.folder)
    print(f"wrote {parsed.folder}: model.safetensors, config.json, tokenizer.json; read back, logits equal")
    return 0


def _tracking_uri() -> str:
    from lmu_dist.tracking import default_uri

    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri(Path.cwd())


def _run_folder(run: str) -> Path:
    """A folder as given, or that of an MLflow run."""
    if Path(run).is_dir():
        return Path(run)
    from lmu_dist.tracking import Store

    return Store(_tracking_uri()).folder_of(run)


class _Bars:
    """Progress of long work: bars on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tasks, self._printed = progress, dict[str, TaskID](), 0.0

    def show(self, what: str, done: float, total: float, detail: str = "") -> None:
        """Brings one bar up to date."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, detail=detail)
        self._progress.update(self._tasks[what], completed=done, total=total, detail=detail)
        now = self._progress.get_time()
        if not console.is_terminal and (now - self._printed > 10 or done == total):
            self._printed = now
            console.print(f"{what} {done / total:.0%} {detail}", markup=False)

    def show_training(self, config: Config, latest: dict[str, float]) -> None:
        """The newest step of a run."""
        if "train/loss_nats" in latest:
            speed = latest.get("speed/tokens_per_second", 0.0)
            validation = f", validation {latest['val/loss_nats']:.3f}" if "val/loss_nats" in latest else ""
            detail = f"loss {latest['train/loss_nats']:.3f}{validation} nats, {speed:,.0f} tokens/s"
            tokens = latest["train/tokens"]
            self.show("training", tokens, config.train.n_steps * config.train.batch_tokens, detail)


@contextmanager
def _bars() -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bars(progress)


if __name__ == "__main__":
    sys.exit(main())
