"""Commands that use finished runs: status, report, generate, export.

Heavy modules are imported inside the functions, so that --help is fast.
"""

from dataclasses import asdict
from itertools import islice
from pathlib import Path

import click

from lmu_dist import show
from lmu_dist.cli.common import (
    cli,
    family_option,
    json_option,
    print_notes,
    resolve_path,
    run_folder,
    tracking_uri,
    write_report_files,
)
from lmu_dist.config import ConfigError, open_folder


@cli.command()
@click.argument("experiment")
@click.option("--once", is_flag=True, help="Print the table once instead of updating it on a terminal.")
@json_option
def status(experiment: str, once: bool, as_json: bool) -> None:
    """Print one row per cell of an experiment: state, tokens, loss.

    On a terminal the table is updated until all cells have ended.
    """
    from lmu_dist.tracking.progress import rows
    from lmu_dist.tracking.reports import reports_of
    from lmu_dist.tracking.store import existing_store
    from lmu_dist.tracking.upload import set_client_limits

    set_client_limits()
    store = existing_store(tracking_uri())
    if as_json:
        show.print_json([asdict(row) for row in rows(store, experiment)])
    else:
        show.print_status(lambda: rows(store, experiment), live=not once)
        if not reports_of(store, experiment):
            return
        from lmu_dist.report.write import stale_reports  # imports torch and matplotlib, which takes seconds

        print_notes(
            [
                f"report {run_id} is stale: the finished runs of the experiment have changed since"
                for run_id in stale_reports(store, experiment)
            ]
        )


@cli.command()
@click.argument("experiment", required=False)
@click.option(
    "--from",
    "tables",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Make the report from the runs.csv of an earlier report instead of MLflow. May be repeated.",
)
@click.option("-o", "--output", default="report", show_default=True, help="Folder in which the report is written.")
@click.option("--any-code", is_flag=True, help="Versions of a family or of the training may differ between runs.")
@click.option(
    "--baseline",
    metavar="F",
    help="Family that the others are compared with; by default plan.baseline of the ladder, else transformer, else llama.",
)
@click.option("--family", metavar="F", help="Family whose factor over the baseline is the answer; by default lmu.")
@json_option
def report(
    experiment: str | None,
    tables: tuple[Path, ...],
    output: str,
    any_code: bool,
    baseline: str | None,
    family: str | None,
    as_json: bool,
) -> None:
    """Write the report of an experiment and upload it to MLflow.

    It has scaling laws, data-efficiency factors of all families over one of them, figures, and the page report.html. With
    --from it is made from tables of records, and MLflow is not needed; forecasts.csv and position_losses.csv are read from the
    folder of each table.
    """
    if bool(experiment) == bool(tables):
        raise click.UsageError("name an experiment in MLflow, or tables of records by --from FILE.csv; one of the two")
    written = write_report_files(experiment or tables, output, any_code, baseline, family)
    if as_json:
        show.print_json(written.results_json)
    else:
        show.print_report(written, open_folder(resolve_path(output)))


@cli.command()
@click.argument("run")
@click.option("--prompt", default="import ", show_default=True, help="Text that the model continues.")
@click.option("--tokens", default=100, show_default=True, type=click.IntRange(1), help="Number of tokens to generate.")
@click.option(
    "--temperature",
    default=0.8,
    show_default=True,
    type=click.FloatRange(0),
    help="Sampling temperature; 0 always takes the most likely token.",
)
@click.option(
    "--top-k", default=50, show_default=True, type=click.IntRange(0), help="Sample from the k most likely tokens; 0: from all."
)
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most likely tokens whose probabilities sum to this.",
)
@click.option(
    "--samples",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Number of texts; the first is printed while it is generated, the others after it.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Random seed of the first text; each further text adds one.",
)
@family_option
def generate(
    run: str,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    samples: int,
    seed: int,
    family: str | None,
) -> None:
    """Generate text with a trained model.

    RUN is a name or key that `lmu-dist status` prints, the folder of a run or of an export, or an MLflow run id.
    """
    from tokenizers.decoders import DecodeStream

    from lmu_dist.models.generate import Sampling
    from lmu_dist.models.generate import generate as sample
    from lmu_dist.train.export import load_trained_model

    trained = load_trained_model(run_folder(run), family)
    print_notes(trained.skipped)
    # Without the tokens that a tokenizer may put around a text, which the model has not seen.
    ids = trained.tokenizer.encode(prompt, add_special_tokens=False).ids or [trained.end_of_text_id]
    beginning = trained.tokenizer.decode(ids, skip_special_tokens=False)
    streams, texts = [DecodeStream(ids) for _ in range(samples)], [[beginning] for _ in range(samples)]
    print(beginning, end="", flush=True)
    try:
        for next_tokens in islice(sample(trained.model, [ids] * samples, Sampling(temperature, top_k, top_p, seed)), tokens):
            for stream, text, token in zip(streams, texts, next_tokens.tolist(), strict=True):
                more = stream.step(trained.tokenizer, token) or ""  # None until all bytes of a character are there
                text.append(more)
                if text is texts[0]:
                    print(more, end="", flush=True)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    finally:  # print the texts so far, also after Ctrl-C or at the end of the model's positions
        print()
        for text in texts[1:]:
            print(f"\n{''.join(text)}")


@cli.command()
@click.argument("run")
@click.argument("folder")
@click.option(
    "--format",
    "to_format",
    type=click.Choice(["safetensors", "transformers"]),
    default="safetensors",
    show_default=True,
    help="transformers: with code, for AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).",
)
@click.option(
    "--report", "report_folder", metavar="DIR", help="transformers: the folder of a report, for the law in the model card."
)
@family_option
def export(run: str, folder: str, to_format: str, report_folder: str | None, family: str | None) -> None:
    """Write a trained model as safetensors, config and tokenizer, or as a folder that transformers loads.

    Then reload it and compare the logits. RUN is a name or key that `lmu-dist status` prints, the folder of a run, or an
    MLflow run id; FOLDER must be new.
    """
    if to_format == "transformers":
        from lmu_dist.exporting.transformers_folder import export as export_folder

        fits = open_folder(resolve_path(report_folder)) if report_folder else None
        print_notes(export_folder(run_folder(run), open_folder(folder), family, fits))
        print(f"wrote {folder}: README.md says how to load it and how to score a text")
        return
    if report_folder:
        raise ConfigError(
            "--report is for the model card, which only --format transformers writes; add it, or leave --report out"
        )
    from lmu_dist.train.export import export as export_model

    print_notes(export_model(run_folder(run), open_folder(folder), family))
    print(f"wrote {folder}: model.safetensors, config.json, tokenizer.json; reloaded, and the logits are equal")
