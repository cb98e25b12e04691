"""`lmu-dist`: parses, calls one function, prints. Run `lmu-dist --help`.

Exit codes: 0 done, 1 failed, 2 bad input (one line that names the fix; nothing was started).
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lmu_dist import __version__
from lmu_dist.config import Config, ConfigError, FailedError, load

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
job = click.argument("config")
settings = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Train LMU language models on Ray and DeepSpeed, recorded by MLflow.

    CONFIG is a YAML file such as jobs/train.yaml; KEY=VALUE overrides one of its keys, as in train.learning_rate=1e-3.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script: the exit code."""
    try:
        return cli.main(arguments, prog_name="lmu-dist", standalone_mode=False) or 0
    except click.ClickException as e:
        e.show()
        return 2
    except ConfigError as e:
        for line in str(e).splitlines():
            console.print(f"lmu-dist: {line}")
        return 2
    except FailedError as e:
        console.print(f"lmu-dist: {e}; the same command goes on from where it stood")
        return 1
    except OSError as e:
        console.print(f"lmu-dist: {e}; mend that and start the same command again, it goes on from where it stood")
        return 1
    except (KeyboardInterrupt, click.Abort):
        console.print("lmu-dist: interrupted; the same command goes on from where it stood")
        return 1


@cli.command()
@job
@settings
@as_json
def prepare(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Text to packed token rows; resumable; skips what is done."""
    from lmu_dist.data.prepare import prepare as prepare_corpus

    merged = load(config, overrides)
    with _bars() as bars:
        corpus = prepare_corpus(merged.data, merged.storage_folder, bars.show)
    manifest = corpus.manifest
    if as_json:
        print(json.dumps({"folder": str(corpus.folder), **asdict(manifest)}))
        return
    for split, facts in manifest.splits.items():
        print(f"{split:<12}{facts['tokens']:>14,} tokens {facts['bytes']:>16,} bytes {facts['documents']:>10,} documents")
    listed = f", listed in {corpus.folder / 'problems.jsonl'}" if manifest.problems else ""
    print(f"left out    {', '.join(f'{n} {kind}' for kind, n in manifest.problems.items()) or 'nothing'}{listed}")
    print(f"folder      {corpus.folder}\nnext        lmu-dist train {config}")


@cli.command()
@job
@settings
@as_json
def train(config: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """One run on the cluster (or a local one started for it); resumable; skips what is done."""
    merged = load(config, overrides)
    from lmu_dist.launch.trainer import train as train_run

    with _bars() as bars:
        finished = train_run(merged, _tracking_uri(), bars.show, lambda latest: bars.show_training(merged, latest))
    record, folder = finished.record, finished.cell.folder
    _tell(finished.notes)
    if as_json:
        facts = {"run_id": finished.run_id, "folder": str(folder), "tracking_uri": finished.tracking_uri}
        print(json.dumps(facts | asdict(record)))
    else:
        print(
            f"{'was done' if finished.already_done else record.status:<12}{finished.cell.name}\n"
            f"model       {record.family}, N = {record.n_params:,}, with head {record.n_params_with_head:,}\n"
            f"tokens      {record.tokens:,} in {record.steps:,} steps, {record.training_seconds:.0f} s of training\n"
            f"validation  {record.val_loss_nats:.4f} +- {record.val_loss_standard_error_nats:.4f} nats per token, "
            f"{record.val_bits_per_byte:.4f} bits per byte\n"
            f"MLflow      run {finished.run_id} in {finished.tracking_uri}\n"
            f"folder      {folder}\n"
            f"next        lmu-dist generate {folder} --prompt 'import '"
        )
    return 0 if record.status == "complete" else 1


@cli.command()
@click.argument("run")
@click.option("--prompt", default="import ", show_default=True, help="Text to go on from.")
@click.option("--tokens", default=100, show_default=True, type=click.IntRange(1), help="Tokens to add.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0 takes the likeliest token.")
@click.option("--top-k", default=50, show_default=True, type=click.IntRange(0), help="Sample from so many; 0: from all.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def generate(run: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Text from a trained model. RUN is the folder of a run or of an export, or an MLflow run id."""
    from lmu_dist.data.tokenizer import end_of_text_id
    from lmu_dist.models.generate import generate as sample
    from lmu_dist.train.export import open_trained

    trained = open_trained(_run_folder(run))
    _tell(trained.passed_over)
    ids = trained.tokenizer.encode(prompt).ids or [end_of_text_id(trained.tokenizer)]
    shown = ""
    try:
        for token in islice(sample(trained.model, tuple(ids), temperature, top_k, seed), tokens):
            ids.append(token)
            text = trained.tokenizer.decode(ids, skip_special_tokens=False)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except ValueError as e:
        raise ConfigError(str(e)) from e
    finally:
        print()


@cli.command()
@click.argument("run")
@click.argument("folder", type=click.Path(path_type=Path))
def export(run: str, folder: Path) -> None:
    """Write a model as safetensors + config + tokenizer, reload it, compare.

    RUN is the folder of a run or an MLflow run id; FOLDER must be new.
    """
    from lmu_dist.train.export import export as write

    _tell(write(_run_folder(run), folder))
    print(f"wrote {folder}: model.safetensors, config.json, tokenizer.json; read back, logits equal")


def _tracking_uri() -> str:
    from lmu_dist.tracking.store import default_uri

    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri(Path.cwd())


def _run_folder(run: str) -> Path:
    """A folder as given, or that of an MLflow run."""
    if Path(run).is_dir():
        return Path(run)
    from lmu_dist.tracking.delivery import limit_retries
    from lmu_dist.tracking.store import Store

    limit_retries()
    return Store(_tracking_uri()).folder_of(run)


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"note: {note}")


class _Bars:
    """Progress of long work: bars on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tasks, self._printed = progress, dict[str, TaskID](), 0.0

    def show(self, what: str, done: float, total: float, detail: str = "") -> None:
        """Brings one bar up to date."""
        first = what not in self._tasks
        if first:
            self._tasks[what] = self._progress.add_task(what, total=total, detail=detail)
        self._progress.update(self._tasks[what], completed=done, total=total, detail=detail)
        if not console.is_terminal and (first or time.monotonic() - self._printed > 10):
            self._printed = time.monotonic()
            console.print(f"{what} {done / (total or 1):.0%} {detail}")

    def show_training(self, config: Config, latest: dict[str, float]) -> None:
        """The newest step of a run; before the first one, that its workers are starting."""
        if "train/loss_nats" not in latest:
            self.show("starting the workers", 0, 1)
            return
        speed = latest.get("speed/tokens_per_second", 0.0)
        validation = f", validation {latest['val/loss_nats']:.3f}" if "val/loss_nats" in latest else ""
        detail = f"loss {latest['train/loss_nats']:.3f}{validation} nats, {speed:,.0f} tokens/s"
        self.show("training", latest["train/tokens"], config.train.n_steps * config.train.batch_tokens, detail)


@contextmanager
def _bars() -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bars(progress)


if __name__ == "__main__":
    sys.exit(main())
