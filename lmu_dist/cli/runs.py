"""Commands that plan and start runs: prepare, train, ladder, tune, plan.

Heavy modules are imported inside the functions, so that --help is fast.
"""

from dataclasses import asdict

import click

from lmu_dist import show
from lmu_dist.cli.common import (
    cli,
    config_argument,
    json_option,
    load_config,
    load_config_or_run,
    overrides_argument,
    print_notes,
    print_precision_note,
    resolve_path,
    tracking_uri,
    write_report_files,
)
from lmu_dist.config import open_folder
from lmu_dist.storage import local_output_dir
from lmu_dist.tracking.pages import ui_hint


@cli.command()
@config_argument
@overrides_argument
@json_option
def prepare(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Tokenize a corpus and pack it into sequences. Resumable; finished parts are skipped."""
    from lmu_dist.launch.corpus import prepare_corpus

    merged = load_config(config, overrides)
    with show.progress_bars() as bars:
        corpus = prepare_corpus(merged, bars.update)
    manifest = corpus.manifest
    if as_json:
        show.print_json({"folder": str(corpus.folder), **asdict(manifest)})
        return
    for split, facts in manifest.splits.items():
        print(f"{split:<12}{facts['tokens']:>14,} tokens {facts['bytes']:>16,} bytes {facts['documents']:>10,} documents")
    listed = f" (listed in {corpus.folder / 'problems.jsonl'})" if manifest.problems else ""
    problems = (f"{n} {reason.removeprefix('left out: ')}" for reason, n in manifest.problems.items())
    print(f"left out    {', '.join(problems) or 'nothing'}{listed}")
    print(f"folder      {corpus.folder}\nnext        lmu-dist train {config}")


@cli.command()
@config_argument
@overrides_argument
@json_option
def train(config: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Train one model, on a Ray cluster or on this machine.

    Without a cluster, a local Ray is started. Resumable; a finished run is not repeated. Instead of CONFIG, the name or key of
    a run goes on with that run.
    """
    merged = load_config_or_run(config, overrides)
    print_precision_note(merged)
    from lmu_dist.launch.trainer import train as train_run

    with show.progress_bars() as bars:
        finished = train_run(merged, tracking_uri(), bars.update, lambda latest: bars.update_training(merged, latest))
    record, folder = finished.record, finished.cell.folder
    print_notes(finished.notes)
    if as_json:
        facts = {"run_id": finished.run_id, "folder": str(folder), "tracking_uri": finished.tracking_uri}
        show.print_json(facts | record.to_json())
    else:
        print(
            f"{'done before' if finished.already_done else record.status:<12}{finished.cell.name}\n"
            f"model       {record.family}, N = {record.n_params:,}, with head {record.n_params_with_head:,}\n"
            f"tokens      {record.tokens:,} in {record.steps:,} steps, {record.training_seconds:.0f} s of training\n"
            f"validation  {record.val_loss_nats:.4f} +- {record.val_loss_standard_error_nats:.4f} nats per token, "
            f"{record.val_bits_per_byte:.4f} bits per byte\n"
            f"MLflow      {f'run {finished.run_id}' if finished.run_id else 'no run yet'} in {finished.tracking_uri}\n"
            f"curves      {ui_hint(merged.experiment)}\n"
            f"folder      {folder}\n"
            f"next        lmu-dist generate {folder} --prompt 'import '"
        )
    return 0 if record.status == "complete" else 1


@cli.command()
@config_argument
@overrides_argument
@click.option(
    "--rerun",
    multiple=True,
    metavar="KEY",
    help="Repeat the finished cell with this key (or start of a key) or name. Not needed to continue after an interruption.",
)
@click.option("--report", metavar="FOLDER", help="Then write the report of the experiment, as the command report does.")
@json_option
def ladder(config: str, overrides: tuple[str, ...], rerun: tuple[str, ...], report: str | None, as_json: bool) -> int:
    """Train every missing cell of a grid, each exactly once.

    A grid is families x sizes x token budgets x seeds. Resumable. With ladder.until, cells are trained in the order in which
    they are worth their price, and only until an interval is narrow enough.
    """
    merged = load_config(config, overrides)
    print_precision_note(merged)
    from lmu_dist.launch.ladder import ladder as run_ladder

    with show.progress_bars() as bars:
        keys = [key.rpartition("-")[2] for key in rerun]  # the name of a run ends with the start of its key
        result = run_ladder(merged, tracking_uri(), bars.update, keys)
    print_notes([*result.notes, *([result.stopped] if result.stopped else [])])
    if as_json:
        cells = [
            f.record.to_json() | {"run_id": f.run_id, "folder": str(f.cell.folder), "was_done": f.already_done}
            for f in result.finished
        ]
        show.print_json({"cells": cells, "failures": result.failures, "stopped": result.stopped})
    else:
        show.print_ladder(result, tracking_uri())
    if report is not None and result.finished:
        written = write_report_files(merged.experiment, report)
        if not as_json:
            show.print_report(written, open_folder(resolve_path(report)))
    return 1 if result.failures else 0


@cli.command()
@config_argument
@overrides_argument
@click.option("-o", "--output", default="tuned.yaml", show_default=True, help="YAML file for the best settings.")
@json_option
def tune(config: str, overrides: tuple[str, ...], output: str, as_json: bool) -> int:
    """Search hyper-parameters with ASHA, per family and size.

    Writes the best settings as a YAML file that a ladder can include.
    """
    merged = load_config(config, overrides)
    print_precision_note(merged)
    from lmu_dist.launch.tune import tune as search
    from lmu_dist.launch.winners import plot_sensitivity, write_winners

    with show.progress_bars() as bars:
        searches, notes = search(merged, tracking_uri(), bars.update)
    winners = open_folder(resolve_path(output))
    figure = winners.with_suffix(".png")
    with local_output_dir(winners.parent) as folder:
        write_winners(folder / winners.name, merged, searches)
        plot_sensitivity(folder / figure.name, merged, searches)
    print_notes(notes)
    if as_json:
        show.print_json({"searches": [asdict(s) for s in searches], "winners": str(winners), "figure": str(figure)})
    else:
        show.print_tune(searches, winners, figure)
    return 0 if all(s.best and not s.failures for s in searches) else 1


@cli.command()
@config_argument
@overrides_argument
@click.option(
    "--calibrate", is_flag=True, help="First measure the time of a step of every cell, on the cluster or a local Ray."
)
@json_option
def plan(config: str, overrides: tuple[str, ...], calibrate: bool, as_json: bool) -> None:
    """Print the plan of a ladder: cells, memory, time, power.

    Also parameters, FLOPs and cost. Nothing is trained, except a few steps with --calibrate.
    """
    merged = load_config(config, overrides)
    print_precision_note(merged)
    from lmu_dist.planning.cost import plan as cost_of
    from lmu_dist.planning.power import estimate_power
    from lmu_dist.planning.until import expected_course

    if calibrate:
        from lmu_dist.launch.calibrate import calibrate as measure

        with show.progress_bars() as bars:
            measure(merged, bars.update)
    costs, precision, course = cost_of(merged), estimate_power(merged), expected_course(merged)
    if as_json:
        cells, until = [asdict(line) for line in costs.cells], {"until": asdict(course)} if course else {}
        show.print_json({"cells": cells, "power": asdict(precision), **costs.totals(), **until})
    else:
        show.print_plan(costs, precision, merged.plan)
        if course is not None:
            print(course.line())
