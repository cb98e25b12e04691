"""Commands that look at what was run: status, report, fit, generate, export. Heavy imports are inside, for a fast --help."""

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import click

from lmu_dist import show
from lmu_dist.cli.common import as_json, cli, place, tell, tracking_uri
from lmu_dist.config import ConfigError, Folder, open_folder
from lmu_dist.storage import local_first


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
    store = Store(tracking_uri())
    if as_json:
        print(json.dumps([asdict(row) for row in rows(store, experiment)]))
    else:
        show.status(lambda: rows(store, experiment), live=not once)
        tell(
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
    with show.bars() as bars, local_first(open_folder(place(output))) as folder:
        written = write_report(Store(tracking_uri()), experiment, folder, any_code, bars.show)
    if as_json:
        print(json.dumps(written.results))
    else:
        show.report(written, open_folder(place(output)))


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
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Of the likeliest that sum to this.",
)
@click.option(
    "--samples", default=1, show_default=True, type=click.IntRange(1), help="Texts; from the second on after the first."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the first text; then one more each.")
def generate(run: str, prompt: str, tokens: int, temperature: float, top_k: int, top_p: float, samples: int, seed: int) -> None:
    """Text from a trained model, as it is made. RUN is the folder of a run or of an export, or an MLflow run id."""
    from tokenizers.decoders import DecodeStream

    from lmu_dist.data.tokenizer import end_of_text_id
    from lmu_dist.models.generate import Sampling
    from lmu_dist.models.generate import generate as sample
    from lmu_dist.train.export import open_trained

    trained = open_trained(run_folder(run))
    tell(trained.passed_over)
    ids = trained.tokenizer.encode(prompt).ids or [end_of_text_id(trained.tokenizer)]
    beginning = trained.tokenizer.decode(ids, skip_special_tokens=False)
    streams, texts = [DecodeStream(ids) for _ in range(samples)], [[beginning] for _ in range(samples)]
    print(beginning, end="", flush=True)
    try:
        for drawn in islice(sample(trained.model, [ids] * samples, Sampling(temperature, top_k, top_p, seed)), tokens):
            for stream, text, token in zip(streams, texts, drawn.tolist(), strict=True):
                more = stream.step(trained.tokenizer, token) or ""  # none while a character's bytes are not all there
                text.append(more)
                if text is texts[0]:
                    print(more, end="", flush=True)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    finally:  # what there is of them, also where a model's positions end, or patience
        print()
        for text in texts[1:]:
            print(f"\n{''.join(text)}")


@cli.command()
@click.argument("run")
@click.argument("folder")
def export(run: str, folder: str) -> None:
    """Write a model as safetensors + config + tokenizer, reload it, compare.

    RUN is the folder of a run or an MLflow run id; FOLDER must be new.
    """
    from lmu_dist.train.export import export as write

    tell(write(run_folder(run), open_folder(folder)))
    print(f"wrote {folder}: model.safetensors, config.json, tokenizer.json; read back, logits equal")


def run_folder(run: str) -> Folder:
    """A folder as given, or that of an MLflow run."""
    if "://" in run or Path(run).is_dir():
        return open_folder(run)
    from lmu_dist.tracking.delivery import set_client_limits
    from lmu_dist.tracking.store import Store

    set_client_limits()
    return Store(tracking_uri()).folder_of(run)
