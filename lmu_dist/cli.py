"""`lmu-dist`: parses, calls one function, prints. Run `lmu-dist --help`.

Exit codes: 0 done, 1 failed, 2 bad input (one line that names the fix; nothing was started), 3 a law is not determined.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmu_dist import __version__, show
from lmu_dist.config import Config, ConfigError, FailedError, Folder, load, open_folder, with_settings
from lmu_dist.storage import local_first

if TYPE_CHECKING:
    from lmu_dist.launch.jobs import Client

job = click.argument("config")
settings = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
at = click.option("--address", metavar="URL", help="The cluster's dashboard; else $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS.")


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
            show.console.print(f"lmu-dist: {line}")
        return 2
    except FailedError as e:
        show.console.print(f"lmu-dist: {e}; the same command goes on from where it stood")
        return 1
    except OSError as e:
        show.console.print(f"lmu-dist: {e}; mend that and start the same command again, it goes on from where it stood")
        return 1
    except (KeyboardInterrupt, click.Abort):
        show.console.print("lmu-dist: interrupted; the same command goes on from where it stood")
        return 1


@cli.command()
@job
@settings
@as_json
def prepare(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Text to packed token rows; resumable; skips what is done."""
    from lmu_dist.launch.corpus import prepared

    merged = _load(config, overrides)
    with show.bars() as bars:
        corpus = prepared(merged, bars.show)
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
    merged = _load(config, overrides)
    from lmu_dist.launch.trainer import train as train_run

    with show.bars() as bars:
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
@job
@settings
@click.option(
    "--rerun",
    multiple=True,
    metavar="KEY",
    help="Run a cell again though it has ended, by (the start of) its key; to go on after an interruption leave it out.",
)
@as_json
def ladder(config: str, overrides: tuple[str, ...], rerun: tuple[str, ...], as_json: bool) -> int:
    """Every missing cell of a size x token x family x seed grid, exactly once; resumable."""
    merged = _load(config, overrides)
    from lmu_dist.launch.ladder import ladder as run_ladder

    with show.bars() as bars:
        result = run_ladder(merged, _tracking_uri(), bars.show, rerun)
    _tell(result.notes)
    if as_json:
        cells = [
            asdict(f.record) | {"run_id": f.run_id, "folder": str(f.cell.folder), "was_done": f.already_done}
            for f in result.finished
        ]
        print(json.dumps({"cells": cells, "failures": result.failures}))
    else:
        show.ladder(result, _tracking_uri())
    return 1 if result.failures else 0


@cli.command()
@job
@settings
@click.option("-o", "--output", default="tuned.yaml", show_default=True, help="Where the winners go.")
@as_json
def tune(config: str, overrides: tuple[str, ...], output: str, as_json: bool) -> int:
    """Hyper-parameter search with ASHA, per family and size; writes the winners as a YAML fragment for ladders."""
    merged = _load(config, overrides)
    from lmu_dist.launch.tune import tune as search
    from lmu_dist.launch.winners import sensitivity, write_winners

    with show.bars() as bars:
        searches, notes = search(merged, _tracking_uri(), bars.show)
    winners = open_folder(_place(output))
    figure = winners.with_suffix(".png")
    with local_first(winners.parent) as folder:
        write_winners(folder / winners.name, merged, searches)
        sensitivity(folder / figure.name, merged, searches)
    _tell(notes)
    if as_json:
        print(json.dumps({"searches": [asdict(s) for s in searches], "winners": str(winners), "figure": str(figure)}))
    else:
        show.tune(searches, winners, figure)
    return 0 if all(s.best and not s.failures for s in searches) else 1


@cli.command()
@job
@settings
@click.option("--calibrate", is_flag=True, help="First measure a step of every cell, on the cluster (or a local one).")
@as_json
def plan(config: str, overrides: tuple[str, ...], calibrate: bool, as_json: bool) -> None:
    """The whole ladder without running it: cells, parameters, FLOPs, memory, time, cost, and what it could tell."""
    merged = _load(config, overrides)
    from lmu_dist.planning.cost import plan as cost_of
    from lmu_dist.planning.power import power

    if calibrate:
        from lmu_dist.launch.calibrate import calibrate as measure

        with show.bars() as bars:
            measure(merged, bars.show)
    costs, told = cost_of(merged), power(merged)
    if as_json:
        print(json.dumps({"cells": [asdict(line) for line in costs.lines], "power": asdict(told), **costs.totals()}))
    else:
        show.plan(costs, told, merged.plan)


@cli.command()
@job
@settings
@at
@click.option(
    "--command", type=click.Choice(["ladder", "tune", "train"]), help="Default: what CONFIG has a section for, else train."
)
@click.option("--follow", is_flag=True, help="Print the job's log until it ends; Ctrl-C leaves the job running.")
def submit(config: str, overrides: tuple[str, ...], address: str | None, command: str | None, follow: bool) -> int:
    """Send the current folder to a cluster and run a command there as a Ray job; the same again goes on with it."""
    merged = load(config, overrides)
    from lmu_dist.launch import jobs as cluster
    from lmu_dist.launch.submission import draft

    drafted = draft(merged, Path(config), overrides, command, Path.cwd())
    show.package(drafted.package)
    _tell(drafted.notes)
    client = cluster.connect(address)
    name, new = cluster.submit(client, drafted)
    print(f"job         {name}{'' if new else ', there already with the same content: not submitted again'}")
    if follow:
        return _follow(client, name)
    print(f"follow      lmu-dist jobs follow {name} --address {client.get_address()}")
    return 0


@cli.group()
def jobs() -> None:
    """The jobs of a cluster: list, follow and stop them."""


@jobs.command("list")
@at
@as_json
def list_jobs(address: str | None, as_json: bool) -> None:
    """All jobs the cluster knows, latest first."""
    from lmu_dist.launch.jobs import connect, listed

    rows = listed(connect(address))
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        show.jobs(rows)


@jobs.command("follow")
@click.argument("name", metavar="ID")
@at
def follow_job(name: str, address: str | None) -> int:
    """Print a job's log until it ends, whatever happens to the connection; Ctrl-C leaves the job running.

    Exit code: 0 it succeeded, 1 it did not, or is not followed to its end.
    """
    from lmu_dist.launch.jobs import connect

    return _follow(connect(address), name)


@jobs.command("stop")
@click.argument("name", metavar="ID")
@at
def stop_job(name: str, address: str | None) -> None:
    """Interrupt a job, as Ctrl-C would, and wait for its end."""
    from lmu_dist.launch.jobs import connect, stop

    show.job(stop(connect(address), name))


@cli.command()
@click.argument("experiment")
@click.option("--once", is_flag=True, help="Print the table once, also on a terminal.")
@as_json
def status(experiment: str, once: bool, as_json: bool) -> None:
    """One row per cell of an experiment: state, tokens, loss, speed; live on a terminal, until all have ended."""
    from lmu_dist.report.write import stale_reports
    from lmu_dist.tracking.delivery import set_client_limits
    from lmu_dist.tracking.progress import rows
    from lmu_dist.tracking.store import Store

    set_client_limits()
    store = Store(_tracking_uri())
    if as_json:
        print(json.dumps([asdict(row) for row in rows(store, experiment)]))
    else:
        show.status(lambda: rows(store, experiment), live=not once)
        _tell(
            [
                f"report {run_id} is stale: the experiment has other finished runs now"
                for run_id in stale_reports(store, experiment)
            ]
        )


@cli.command()
@click.argument("experiment")
@click.option("-o", "--output", default="report", show_default=True, help="Folder the report goes to.")
@click.option("--any-code", is_flag=True, help="Compare runs made by different training code too.")
@as_json
def report(experiment: str, output: str, any_code: bool, as_json: bool) -> None:
    """What an experiment says: fits, data-efficiency factor, figures, one-file report.html; kept in MLflow too."""
    from lmu_dist.report.write import write_report
    from lmu_dist.tracking.delivery import set_client_limits
    from lmu_dist.tracking.store import Store

    set_client_limits()
    with show.bars() as bars, local_first(open_folder(_place(output))) as folder:
        written = write_report(Store(_tracking_uri()), experiment, folder, any_code, bars.show)
    if as_json:
        print(json.dumps(written.results))
    else:
        show.report(written, open_folder(_place(output)))


@cli.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--n", "n_params", required=True, metavar="COL", help="Column with the number of parameters.")
@click.option("--d", "tokens", required=True, metavar="COL", help="Column with the training tokens.")
@click.option("--loss", required=True, metavar="COL", help="Column with the final loss in nats per token.")
@click.option("--law", type=click.Choice(["chinchilla", "kaplan", "gadre"]), default="chinchilla", show_default=True)
@click.option("--where", multiple=True, metavar="COND", help="Rows to use: 'col=value', or != < <= > >=. May be repeated.")
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(100), help="Refits for the intervals.")
@as_json
def fit(
    table: Path, n_params: str, tokens: str, loss: str, law: str, where: tuple[str, ...], resamples: int, as_json: bool
) -> int:
    """A scaling law of anybody's CSV TABLE, one row per finished run. Exit 3: the table does not determine the law."""
    from lmu_dist.scaling.examine import examine
    from lmu_dist.scaling.laws import FORMS
    from lmu_dist.scaling.table import read_table
    from lmu_dist.scaling.tell import told

    rows, numbers, left_out = read_table(table, n_params, tokens, loss, where)
    seen = examine(FORMS[law], rows, n_resamples=resamples)
    if as_json:
        facts = told(seen, [str(number) for number in numbers])
        print(json.dumps(facts | {"left_out": [asdict(out) for out in left_out]}, allow_nan=False))
    else:
        show.fit(seen, numbers, left_out)
    return 0 if seen.law else 3


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
@click.argument("folder")
def export(run: str, folder: str) -> None:
    """Write a model as safetensors + config + tokenizer, reload it, compare.

    RUN is the folder of a run or an MLflow run id; FOLDER must be new.
    """
    from lmu_dist.train.export import export as write

    _tell(write(_run_folder(run), open_folder(folder)))
    print(f"wrote {folder}: model.safetensors, config.json, tokenizer.json; read back, logits equal")


@cli.group()
def cluster() -> None:
    """A cluster of several Ray nodes on this machine, with a token, and MLflow beside it."""


cluster_folder = click.option(
    "--folder", default=".cluster", show_default=True, type=click.Path(path_type=Path), help="Where its token and logs are."
)
port = click.IntRange(1024, 65535)


@cluster.command()
@cluster_folder
@click.option("--nodes", default=2, show_default=True, type=click.IntRange(1, 250), help="Beside the head, which has no CPUs.")
@click.option("--cpus", default=1, show_default=True, type=click.IntRange(1), help="Of each node.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address on which dashboard and MLflow listen.")
@click.option("--port", default=6379, show_default=True, type=port, help="Of Ray.")
@click.option("--dashboard-port", default=8265, show_default=True, type=port, help="Of the dashboard and the Jobs API.")
@click.option("--mlflow-port", default=5000, show_default=True, type=port)
def up(folder: Path, **settings: Any) -> None:
    """Start what does not run of it; prints what to say in the shell that will use it: eval "$(lmu-dist cluster up)"."""
    from lmu_dist.launch import local
    from lmu_dist.launch.parts import Settings

    show.cluster(local.up(folder, Settings(**settings), show.console.print), local.exports(folder))


@cluster.command(name="status")
@cluster_folder
def cluster_status(folder: Path) -> int:
    """What runs of it; exit 1 if something does not."""
    from lmu_dist.launch import local

    parts = local.status(folder)
    show.cluster(parts, local.exports(folder))
    return 0 if all(part.state == "alive" for part in parts) else 1


@cluster.command()
@cluster_folder
def down(folder: Path) -> None:
    """End it, and nothing else on this machine; token, logs, and what MLflow has, stay."""
    from lmu_dist.launch import local

    print(f"ended {', '.join(local.down(folder)) or 'nothing: it did not run'}")


def _root() -> str:
    """What relative names of storage and results are relative to: $LMU_DIST_HOME, else this folder, unless it is that of a Ray
    job, which Ray deletes.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return os.environ.get("LMU_DIST_HOME") or str(Path.home() / "lmu-dist" if in_job else Path.cwd())


def _place(name: str) -> str:
    return name if "://" in name or Path(name).expanduser().is_absolute() else f"{_root().rstrip('/')}/{name}"


def _load(path: str, overrides: Sequence[str]) -> Config:
    config = load(path, overrides)
    return with_settings(config, {"storage": _place(config.storage)})


def _tracking_uri() -> str:
    from lmu_dist.tracking.store import default_uri

    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    folder = Path.cwd() if "://" in _root() else Path(_root())
    folder.mkdir(parents=True, exist_ok=True)
    return default_uri(folder)


def _follow(client: "Client", name: str) -> int:
    """Follows a job to its end. Exit code 0 if it succeeded."""
    from lmu_dist.launch.jobs import follow

    try:
        ended = follow(client, name, show.log, lambda said: _tell([said]))
    except KeyboardInterrupt:
        _tell([f"the job goes on; lmu-dist jobs follow {name} --address {client.get_address()} follows it again"])
        return 1
    if ended is None:
        _tell([f"the cluster was started anew and knows no {name}: submit the same again, it goes on from what is on record"])
        return 1
    show.job(ended)
    return 0 if ended.status == "SUCCEEDED" else 1


def _run_folder(run: str) -> Folder:
    """A folder as given, or that of an MLflow run."""
    if "://" in run or Path(run).is_dir():
        return open_folder(run)
    from lmu_dist.tracking.delivery import set_client_limits
    from lmu_dist.tracking.store import Store

    set_client_limits()
    return Store(_tracking_uri()).folder_of(run)


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        show.console.print(f"note: {note}")


if __name__ == "__main__":
    sys.exit(main())
